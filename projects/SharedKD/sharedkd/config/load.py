"""Reads a run's config: the file, its overrides, types and defaults, and own data."""

import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf

from sharedkd.data.coco import CocoSummary
from sharedkd.errors import ConfigError, Findings, collecting
from sharedkd.modeling.detectors import config_path, load_file

from .adopt import adopt_loaders, check_mappers, show_larger_images, use_own_data
from .build import missing_keys, not_set, target_of
from .classic import check_classic, expanded, from_classic, is_classic
from .defaults import DATA_DEFAULTS, TRAIN_DEFAULTS, Data, Train
from .depth import set_depth
from .length import alone, settle_length
from .methods import PLAIN, check_shares
from .overrides import joined, override
from .own_data import add_unlabelled, has_own_data, read_own_data
from .pair import IMAGE_FORMAT, Pairing
from .structure import settle

__all__ = ["Loaded", "load", "load_config", "student_only"]

#: Overrides of what a pairing makes.
PAIRS = re.compile(
    r"[+~]*(train\.inherit|model\.(student|teachers?|stages|peers|input_format|pyramid|max_iter))\b"
)

PATHS = (
    "train.output_dir",
    "train.init_checkpoint",
    "model.teacher.config",
    "model.teacher.weights",
    *(f"data.{x}_{what}" for x in ("train", "val", "unlabelled") for what in ("json", "images")),
)


@dataclass
class Loaded:
    """A run's config, and summaries of its own data.

    Args:
        cfg: with all keys of ``train`` and ``data``, its own data registered.
        data: ``train`` and ``test`` -> a summary of each annotation file; FAILED in place of one that
            cannot be read.  Empty without own data.
    """

    cfg: DictConfig
    data: Dict[str, List[CocoSummary]] = field(default_factory=dict)


@collecting
def load_config(
    path: str,
    overrides: Sequence[str] = (),
    keep_teacher: bool = False,
    without_data: bool = False,
    *,
    findings: Findings,
) -> DictConfig:
    """Return only the config of :func:`load`, with the same arguments."""
    return load(path, overrides, keep_teacher, without_data, findings=findings).cfg


@collecting
def load(
    path: str,
    overrides: Sequence[str] = (),
    keep_teacher: bool = False,
    without_data: bool = False,
    *,
    findings: Findings,
) -> Loaded:
    """Read a config, apply ``key=value`` overrides, fill in defaults, register own data.

    Args:
        path: of a LazyConfig ``.py``, a run's saved ``config.yaml``, or a classic yaml; or a name in
            Detectron2's model zoo.
        overrides: ``key=value`` each, applied in this order; those of ``distill`` come first, see
            :class:`~sharedkd.config.pair.Pairing`.
        keep_teacher: keep a teacher that no stage learns from; otherwise it is removed.
        without_data: own data that is not named is allowed, and counts as 80 classes (COCO's).
        findings: receives the errors after which checks can go on.

    Raises:
        ConfigError: no such file, an override that cannot be applied, an unknown key or impossible
            value of ``train`` or ``data``, or bad own data.
    """
    pairing, overrides = Pairing.of(joined(overrides, findings))
    cfg = _read(path)
    _check_groups(cfg, path)
    adopt_loaders(cfg)
    use_own_data(cfg, overrides)
    if pairing.depth is not None:
        set_depth(cfg, pairing.depth)
    overrides = [x for text in overrides for x in expanded(cfg, text)]
    overrides = [x for text in overrides for x in alone(text)]
    # What the pairing makes may depend on the detector, and be overridden itself.
    makes = pairing and pairing.method != PLAIN
    late = [text for text in overrides if PAIRS.match(text)] if makes else []
    for text in overrides:
        if text not in late:
            findings.step(override, cfg, text, path)
    cfg = pairing.apply(cfg)
    for text in late:
        findings.step(override, cfg, text, path)
    _check_groups(cfg, path)  # an override may have removed one
    findings.step(check_shares, cfg, overrides)
    if is_classic(cfg):
        check_classic(cfg)
    _settle(cfg, findings)
    _expand_home(cfg)
    if cfg.train.fast_dev_run:
        _shorten(cfg)
    if not (keep_teacher or cfg.train.eval_teacher):
        _drop_idle_teachers(cfg, findings)
    show_larger_images(cfg)
    check_mappers(cfg, findings)
    if cfg.model.get("student") is not None and OmegaConf.select(cfg, IMAGE_FORMAT) is not None:
        cfg.model.setdefault("input_format", f"${{{IMAGE_FORMAT}}}")
    data, images = {}, 0 if without_data else None
    if "data" in cfg:
        if without_data:
            cfg.data.num_classes = cfg.data.num_classes or 80
        else:
            data = read_own_data(cfg, findings) if has_own_data(cfg) else {}
            images = sum(x.images for x in data["train"] if x) if data else None
            findings.step(add_unlabelled, cfg, findings)
    findings.step(settle_length, cfg, images)
    return Loaded(cfg, data)


def student_only(cfg: DictConfig) -> DictConfig:
    """A copy of ``cfg`` with the plain student as its model: evaluation needs no teacher."""
    cfg = cfg.copy()
    cfg.model = cfg.model.get("student", cfg.model)
    return cfg


def _read(path: str) -> DictConfig:
    found = config_path(path)
    if found is None:
        fix = "name a config, see configs/, or one of Detectron2's model zoo"
        raise ConfigError("--config-file", path, "no such file", fix)
    cfg = load_file(found, "--config-file")
    if not isinstance(cfg, CfgNode):
        return cfg
    if "SHAREDKD" in cfg.MODEL:
        problem = "has MODEL.SHAREDKD, which a train_net.py of its own reads"
        fix = "name its plain detector's config here, with --teacher and --method"
        raise ConfigError("--config-file", path, problem, fix)
    return from_classic(cfg)


def _check_groups(cfg: DictConfig, path: str) -> None:
    findings = Findings()
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if not isinstance(cfg.get(key), DictConfig):
            problem, fix = f"has no `{key}`", "start from a file of configs/"
            findings.add(ConfigError("--config-file", path, problem, fix))
    findings.raise_errors()


def _settle(cfg: DictConfig, findings: Findings) -> None:
    """Give the groups `train` and `data` of ``cfg`` their types and defaults."""
    groups: Dict[str, Tuple[type, Dict[str, Any]]] = {"train": (Train, TRAIN_DEFAULTS)}
    if "data" in cfg:
        groups["data"] = (Data, DATA_DEFAULTS)
    objects = {"allow_objects": True}
    for key, (_, defaults) in groups.items():  # before values that may refer to them are read
        given = cfg.setdefault(key, {})
        if isinstance(given, DictConfig):
            for name in missing_keys(given):
                findings.add(not_set(f"{key}.{name}"))
            if "epochs" in given and given.epochs is not None:
                given.setdefault("max_iter", None)  # not the default, a length beside this one
            cfg[key] = OmegaConf.merge(OmegaConf.create(defaults, flags=objects), given)
    for key, (structure, _) in groups.items():
        settled = settle(structure, cfg[key], key, findings)
        cfg[key] = OmegaConf.create(settled, flags=objects)


def _expand_home(cfg: DictConfig) -> None:
    """Replace a leading ``~`` of paths."""
    groups = {"teachers": ("config", "weights"), "peers": ("init_checkpoint",)}
    further = [
        f"model.{group}.{name}.{key}"
        for group, keys in groups.items()
        if isinstance(cfg.model.get(group), DictConfig)
        for name in cfg.model[group]
        for key in keys
    ]
    for key in (*PATHS, *further):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, os.path.expanduser(value))
        elif isinstance(value, ListConfig):
            expanded = [os.path.expanduser(x) if isinstance(x, str) else x for x in value]
            OmegaConf.update(cfg, key, expanded)


def _shorten(cfg: DictConfig) -> None:
    """Shorten a config for ``train.fast_dev_run``."""
    cfg.train.update(max_iter=20, epochs=None, eval_period=20, log_period=1, eval_teacher=False)
    cfg.train.checkpointer.period = 10**9  # the final one is the only one
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if isinstance(batch, int):
        cfg.dataloader.train.total_batch_size = min(batch, 2 * comm.get_world_size())


# --- teachers that no stage learns from -----------------------------------------------------------


def _drop_idle_teachers(cfg: DictConfig, findings: Findings) -> None:
    """Remove the teachers that nothing learns or inherits from, so that they are neither loaded nor run."""
    model, wanted = cfg.model, _wanted_teachers(cfg.model)
    known = {None, *(model.get("teachers") or {}), *(model.get("peers") or {})}
    if wanted is None or not wanted <= known:  # an unknown one is refused later
        return
    without = not model.stages.keys() - {"_target_"}  # refused later if nothing is inherited either
    wanted |= {None} if cfg.train.inherit or without else set()
    fix = "give a stage that needs a teacher a weight above 0"
    problem = "no stage learns from it, so it is neither loaded nor run"
    if model.get("teacher") is not None and None not in wanted:
        findings.warn("model.teacher", _name(model.teacher), problem, fix)
        model.teacher = None
    further = model.get("teachers")
    if isinstance(further, DictConfig):
        for name in [x for x in further if x not in wanted]:
            findings.warn(f"model.teachers.{name}", _name(further[name]), problem, fix)
            del further[name]


def _wanted_teachers(model: DictConfig) -> Optional[Set[Optional[str]]]:
    """The teachers that stages learn from, None for `model.teacher`; or None if the stages are wrong."""
    if not isinstance(model.get("stages"), DictConfig):
        return None
    wanted: Set[Optional[str]] = set()
    for name, stage in model.stages.items():
        if name == "_target_":
            continue
        if not isinstance(stage, DictConfig) or "loss" not in stage:
            return None  # reported where the stages are built
        try:
            loss = target_of(OmegaConf.select(stage, "loss"))
        except ImportError:
            return None
        if stage.get("weight", 1.0) and "teacher" in getattr(loss, "needs", ("teacher",)):
            wanted.add(stage.get("teacher"))
    return wanted


def _name(teacher: Any) -> Any:
    return teacher.get("config") if isinstance(teacher, DictConfig) else teacher
