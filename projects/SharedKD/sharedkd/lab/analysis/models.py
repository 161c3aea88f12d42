"""Finds and loads trained detectors: by name, of a run or a comparison, and their teacher."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sharedkd.config import load_config, student_only
from sharedkd.config.build import construct, makes
from sharedkd.errors import ConfigError
from sharedkd.lab.scores import folder_name, mean_of, read_comparison, scores_of
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.teachers import FrozenTeacher
from sharedkd.weights.loading import load_trained

__all__ = [
    "Detector",
    "Source",
    "load_detectors",
    "sources",
    "trained_student",
    "validation_records",
]

TEACHER = "teacher"


@dataclass(frozen=True)
class Source:
    """Where a detector is."""

    name: str
    config: Path
    checkpoint: Optional[Path]  #: None: it is the teacher of that config


@dataclass
class Detector:
    """A trained detector that takes records of the dataset."""

    source: Source
    mapper: Callable[[Dict[str, Any]], Dict[str, Any]]  #: from a record to a model's input
    model: Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]  #: from inputs to results
    parameters: Optional[int] = None  #: their number


def sources(
    folder: Optional[Path],
    config: Optional[Path],
    models: Sequence[str],
    seed: Optional[int] = None,
) -> List[Source]:
    """The detectors that the command line names, in the order of the pictures.

    Args:
        folder: of a comparison, of a run, or with runs right below it; or None.
        config: for checkpoints that have no config.yaml beside them.
        models: ``name=CHECKPOINT``; for a comparison, names of its methods (default: the baseline,
            the first distilled student, and of the others the one with the best AP); beside runs
            they come first.
        seed: of a comparison; None: the first one that all of the methods have.
    """
    pairs = [config] if config else []
    if folder is not None and (folder / "results.json").exists():
        found = _of_comparison(folder, models, seed)
    else:
        # The second is compared with the first, so a run comes after its reference.
        found = [_named(item, config) for item in models]
        if folder is not None and (folder / "config.yaml").exists():
            pairs.append(folder / "config.yaml")
            found.append(_of_run(folder))
        elif folder is not None:
            found += [_of_run(x.parent) for x in sorted(folder.glob("*/config.yaml"))]
    if not found:
        fix = "name a run's folder, or models as name=CHECKPOINT"
        raise ConfigError("--models", "", "there is no model", fix)
    candidates = [*pairs, *(source.config for source in found)]
    teacher = next((path for path in candidates if _has_teacher(path)), None)
    if teacher and TEACHER not in [source.name for source in found]:
        found.append(Source(TEACHER, teacher, None))
    return found


def _named(item: str, config: Optional[Path]) -> Source:
    name, equals, file = item.partition("=")
    checkpoint = Path(file)
    if not equals or not checkpoint.is_file():
        raise ConfigError("--models", item, "is no name=CHECKPOINT of a file", "name a checkpoint")
    beside = checkpoint.parent / "config.yaml"
    if not beside.exists() and config is None:
        raise ConfigError("--models", item, "has no config.yaml beside it", "add --config-file")
    return Source(name, beside if beside.exists() else config, checkpoint)


def _of_run(run: Path, name: str = "") -> Source:
    weights = run / "model_final.pth"
    if not weights.exists():
        raise ConfigError(str(run), "", "has no model_final.pth", "finish this run first")
    return Source(name or run.resolve().name, run / "config.yaml", weights)


def _has_teacher(config: Path) -> bool:
    """Whether there is a trained detector as a teacher, and not an average, say."""
    cfg = load_config(str(config), keep_teacher=True, without_data=True)
    return makes(cfg.model.get("teacher"), FrozenTeacher)


def _of_comparison(folder: Path, methods: Sequence[str], seed: Optional[int]) -> List[Source]:
    record = read_comparison(folder, "DIR")
    runs: Dict[str, Dict[int, Path]] = {}
    for arm in record["arms"]:
        run = folder / folder_name(arm["method"]) / f"seed{arm['seed']}"
        if arm["status"] == "finished" and (run / "model_final.pth").exists():
            runs.setdefault(arm["method"], {})[arm["seed"]] = run
    if not methods:
        plain = record["baseline"]
        first, *others = [m for m in record["methods"] if m in runs and m != plain] or [""]
        others.sort(key=lambda m: -mean_of(scores_of(record, m, "bbox").values() or [0.0]))
        methods = [m for m in (plain, first, *others[:1]) if m in runs]
    for method in methods:
        if method not in runs:
            problem = "has no finished run with weights"
            raise ConfigError("--models", method, problem, f"use {', '.join(runs)}")
    common = sorted(set.intersection(*(set(runs[m]) for m in methods))) if methods else []
    if not common or seed not in (None, *common):
        raise ConfigError("--seed", seed, "not every method has it", f"use one of {common}")
    seed = common[0] if seed is None else seed
    return [_of_run(runs[method][seed], method) for method in methods]


def load_detectors(
    found: Sequence[Source], overrides: Sequence[str] = ()
) -> Tuple[DictConfig, List[Detector]]:
    """Build and load detectors in float32, their configs with ``overrides``; students come first.

    Returns:
        the first one's config, whose validation set is used, and the detectors.  A teacher of other
        classes is left out and reported.

    Raises:
        ConfigError: weights that do not fit, or models that were evaluated on different data.
    """
    paths = dict.fromkeys(str(source.config) for source in found)
    configs = {path: load_config(path, overrides, keep_teacher=True) for path in paths}
    first, detectors, classes = configs[str(found[0].config)], [], None
    for source in found:
        cfg = configs[str(source.config)]
        ours, theirs = (OmegaConf.select(c, "dataloader.test.dataset.names") for c in (cfg, first))
        files = [OmegaConf.select(c, "data.val_json") for c in (cfg, first)]
        if ours != theirs or files[0] != files[1]:
            problem = "is other validation data than that of the first model"
            fix = "compare models of the same data"
            raise ConfigError(source.name, files[0] or ours, problem, fix)
        mapper = instantiate(cfg.dataloader.test.mapper)
        if source.checkpoint is not None:
            model = trained_student(cfg, str(source.checkpoint), source.name).to(cfg.train.device)
            detectors.append(Detector(source, mapper, model, count_parameters(model)))
            classes = num_classes(model)
            continue
        teacher = construct(cfg.model.teacher, "model.teacher").to(cfg.train.device)
        if num_classes(teacher.model) != classes:
            print("the teacher is left out: its classes are not those of the data")
            continue
        predict = partial(teacher.predict, input_format=cfg.model.input_format)
        detectors.append(Detector(source, mapper, predict, count_parameters(teacher.model)))
    return first, detectors


def trained_student(cfg: DictConfig, checkpoint: str, key: str) -> nn.Module:
    """The detector of ``cfg``, of a pair the student alone, with trained weights, in evaluation mode.

    Raises:
        ConfigError: the checkpoint, which ``key`` names, does not fill the detector exactly.
    """
    model = construct(student_only(cfg).model, "model")
    load_trained(model, checkpoint, key, cfg.train.trust_checkpoint)
    return model.eval()


def validation_records(cfg: DictConfig, count: Optional[int]) -> List[Dict[str, Any]]:
    """Records of the validation set: ``count`` of them, evenly spread over it, or all."""
    records = instantiate(cfg.dataloader.test.dataset)
    if not records:
        raise ConfigError("dataloader.test.dataset", "[]", "has no image", "name other data")
    if count is None or count >= len(records):
        return list(records)
    if count < 1:
        raise ConfigError("--images", count, "is below 1", "use 1 or more")
    return [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]
