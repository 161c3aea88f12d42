"""Finds and loads trained detectors: by name, of a run or a comparison, and their teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sharedkd.config import load_config, student_only
from sharedkd.config.build import construct
from sharedkd.errors import ConfigError
from sharedkd.lab.scores import read_comparison
from sharedkd.modeling.detectors import num_classes
from sharedkd.modeling.teachers.frozen import FrozenTeacher
from sharedkd.weights.loading import load_trained

__all__ = ["Detector", "Source", "load_detectors", "sources"]

TEACHER = "teacher"


@dataclass(frozen=True)
class Source:
    """Where a detector is.

    Args:
        name: for titles.
        config: its config file.
        checkpoint: its weights; None: it is the teacher of that config.
    """

    name: str
    config: Path
    checkpoint: Optional[Path]


@dataclass
class Detector:
    """A trained detector that takes records of the dataset.

    Args:
        source: where it is from.
        mapper: from a dataset's record to a model's input, as in its evaluation.
        model: from a list of these inputs to Detectron2's results.
    """

    source: Source
    mapper: Callable[[Dict[str, Any]], Dict[str, Any]]
    model: Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]


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

    Raises:
        ConfigError: there is no model, or one that is named has no checkpoint or no config, or a
            method no finished run of the seed.
    """
    pair = config
    if folder is None:
        found = [_named(item, config) for item in models]
    elif (folder / "results.json").exists():
        found, pair = _of_comparison(folder, models, seed), None
    else:
        own = folder / "config.yaml"
        pair = own if own.exists() else None
        runs = [folder] if pair else [x.parent for x in sorted(folder.glob("*/config.yaml"))]
        # The second is compared with the first, so a run comes after its reference.
        found = [*(_named(item, config) for item in models), *map(_of_run, runs)]
    if not found:
        raise ConfigError(
            "--models", "", "there is no model", "name a run's folder, or models as name=CHECKPOINT"
        )
    candidates = [pair] if pair else [source.config for source in found]
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


def _of_run(run: Path) -> Source:
    weights = run / "model_final.pth"
    if not weights.exists():
        raise ConfigError(str(run), "", "has no model_final.pth", "finish this run first")
    return Source(run.resolve().name, run / "config.yaml", weights)


def _has_teacher(config: Path) -> bool:
    return (
        OmegaConf.select(load_config(str(config), keep_teacher=True), "model.teacher") is not None
    )


def _of_comparison(folder: Path, methods: Sequence[str], seed: Optional[int]) -> List[Source]:
    record = read_comparison(folder, "DIR")
    runs: Dict[str, Dict[int, Path]] = {}
    for arm in record["arms"]:
        # An arm's config has the name of its method's folder.
        run = folder / Path(arm["config"]).stem / f"seed{arm['seed']}"
        if arm["status"] == "finished" and (run / "model_final.pth").exists():
            runs.setdefault(arm["method"], {})[arm["seed"]] = run
    methods = methods or _chosen(record, list(runs))
    for method in methods:
        if method not in runs:
            raise ConfigError(
                "--models", method, "has no finished run with weights", f"use {', '.join(runs)}"
            )
    common = sorted(set.intersection(*(set(runs[m]) for m in methods))) if methods else []
    if not common or seed not in (None, *common):
        raise ConfigError("--seed", seed, "not every method has it", f"use one of {common}")
    seed = common[0] if seed is None else seed
    return [
        Source(m, runs[m][seed] / "config.yaml", runs[m][seed] / "model_final.pth") for m in methods
    ]


def _chosen(record: Mapping[str, Any], methods: Sequence[str]) -> List[str]:
    """Baseline, the first distilled student, and the best of the other methods."""

    def mean_ap(method: str) -> float:
        arms = [a for a in record["arms"] if a["method"] == method and a["status"] == "finished"]
        found = [(a["results"].get("bbox") or {}).get("AP") or 0.0 for a in arms]
        return sum(found) / len(found)

    distilled = [m for m in record["methods"] if m in methods and m != record["baseline"]]
    others = sorted(distilled[1:], key=mean_ap, reverse=True)[:1]
    return [m for m in [record["baseline"]] if m in methods] + distilled[:1] + others


def load_detectors(
    found: Sequence[Source], overrides: Sequence[str], say: Callable[[str], None]
) -> Tuple[DictConfig, List[Detector]]:
    """Build and load detectors in float32.

    Args:
        found: what :func:`sources` returned.
        overrides: ``key=value`` for the configs of all of them.
        say: receives the line about a teacher that is left out.

    Returns:
        the first one's config, whose validation set is used, and the detectors.  A teacher of other
        classes is left out and reported.

    Raises:
        ConfigError: weights that do not fit, or models that were evaluated on different data.
    """
    first, detectors = None, []
    for source in found:
        cfg = load_config(str(source.config), overrides, keep_teacher=True)
        first = first or cfg
        ours, theirs = (OmegaConf.select(c, "dataloader.test.dataset.names") for c in (cfg, first))
        files = [OmegaConf.select(c, "data.val_json") for c in (cfg, first)]
        if ours != theirs or files[0] != files[1]:
            raise ConfigError(
                source.name, files[0] or ours, "is other validation data than that of the first model",
                "compare models of the same data",
            )  # fmt: skip
        mapper = instantiate(cfg.dataloader.test.mapper)
        if source.checkpoint is None:
            teacher = construct(cfg.model.teacher, "model.teacher").to(cfg.train.device)
            if num_classes(teacher.model) != num_classes(
                construct(student_only(cfg).model, "model")
            ):
                say("the teacher is left out: its classes are not those of the data")
                continue
            image_format = cfg.model.input_format
            detectors.append(Detector(source, mapper, _predict(teacher, image_format)))
        else:
            detectors.append(Detector(source, mapper, _student(cfg, source)))
    return first, detectors


def _student(cfg: DictConfig, source: Source) -> nn.Module:
    model = construct(student_only(cfg).model, "model")
    load_trained(model, str(source.checkpoint), source.name, cfg.train.trust_checkpoint)
    return model.to(cfg.train.device).eval()


def _predict(
    teacher: FrozenTeacher, image_format: str
) -> Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]:
    return lambda inputs: teacher.predict(inputs, image_format)
