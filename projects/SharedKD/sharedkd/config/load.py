"""LazyConfig helpers: a distillation pair in a few lines, own COCO-format data in four keys."""

import os
from typing import Any, Dict, List, Mapping, Optional, Sequence

from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from sharedkd.data.coco import CocoData, Reading, read_coco
from sharedkd.data.images import ImageMapper
from sharedkd.errors import FAILED, ConfigError, Findings, collecting
from sharedkd.values import check_switch

from .build import not_set
from .defaults import GONE, TRAIN_DEFAULTS, TRAIN_RULES, TYPE_RULES
from .overrides import check_override, not_applicable

__all__ = [
    "load_config",
    "override",
    "student_only",
]


@collecting
def load_config(
    path: str,
    overrides: Sequence[str] = (),
    keep_teacher: bool = False,
    without_data: bool = False,
    *,
    findings: Findings,
) -> DictConfig:
    """Read a LazyConfig, apply ``key=value`` overrides, fill in defaults, settle own data.

    Args:
        path: of an existing ``.py`` file, or of a ``.yaml`` such as a run's saved config.
        overrides: ``key=value`` each, applied in this order.
        keep_teacher: also one that no stage learns from; else it is neither loaded nor run.
        without_data: nothing will be loaded; own data that is not named has COCO's 80 classes.
        findings: takes the errors that leave something to go on checking; its fact ``data`` becomes
            the summaries of own data, see :func:`settle_own_data`.

    Raises:
        ConfigError: no such file, an override that cannot be applied, an unknown key or impossible
            value of ``train``, or bad own data.
    """
    cfg = _read(path)
    for text in overrides:
        findings.step(override, cfg, text, path)
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if not isinstance(cfg.get(key), DictConfig):
            findings.add(
                ConfigError(
                    "--config-file", path, f"has no `{key}`", "start from a file of configs/"
                )
            )
            findings.raise_errors()  # there is nothing else to check
    _refuse_gone(cfg, findings)
    cfg.train = _settle_train(cfg.get("train", {}), findings)
    if cfg.train.fast_dev_run:
        cfg.train.max_iter = cfg.train.eval_period = 20
        cfg.train.log_period = 1
        cfg.train.eval_teacher = False
        cfg.train.checkpointer.period = 10**9  # the final one is the only one
        batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
        if isinstance(batch, int):
            cfg.dataloader.train.total_batch_size = min(batch, 2 * comm.get_world_size())
    if "data" in cfg and without_data:
        cfg.data.num_classes = cfg.data.num_classes or 80
    elif "data" in cfg:
        settle_own_data(cfg, findings)
    if not (keep_teacher or cfg.train.inherit or cfg.train.eval_teacher):
        _drop_idle_teacher(cfg.model, findings)
    return cfg


def _read(path: str) -> DictConfig:
    if not os.path.isfile(path):
        raise ConfigError("--config-file", path, "no such file", "name a config, see configs/")
    try:
        return LazyConfig.load(path)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError("--config-file", path, f"cannot be read: {e}", "correct that file") from e


def override(cfg: DictConfig, text: str, path: str) -> None:
    """Apply one ``key=value`` to a config.

    Args:
        cfg: changed in place.
        text: the ``key=value``, as on a command line.
        path: the config's, for messages.

    Raises:
        ConfigError: it cannot be applied, names code to be run, or a group that the config lacks.
    """
    known = {*cfg, "train"}
    check_override(text)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except Exception as e:
        raise not_applicable(text, e) from e
    for key in sorted(set(cfg) - known):
        del cfg[key]
        raise ConfigError(
            "override", text, f"{path} has no {key}", f"use one of {', '.join(sorted(known))}"
        )


def _refuse_gone(cfg: DictConfig, findings: Findings) -> None:
    """Report the keys of earlier versions, and go on without them."""
    for key, remedy in GONE.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group)
        if isinstance(node, DictConfig) and name in node.keys():
            value = "???" if OmegaConf.is_missing(node, name) else node[name]
            findings.add(ConfigError(key, value, "this key is gone", remedy))
            del node[name]


def _settle_train(given: Any, findings: Findings) -> DictConfig:
    """`train` with defaults for what is not given, and for what is wrong while the rest is checked."""
    if not isinstance(given, Mapping):
        findings.add(ConfigError("train", given, "is no group of keys", "use train.KEY=VALUE"))
        given = {}
    train = OmegaConf.create(TRAIN_DEFAULTS)
    _fill(train, given, TRAIN_DEFAULTS, "train", findings)
    return train


def _fill(
    train: DictConfig,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    group: str,
    findings: Findings,
) -> None:
    for name, default in known.items():
        if name not in given:
            continue
        key = f"{group}.{name}"
        if OmegaConf.is_missing(given, name):
            findings.add(not_set(key))
        elif not isinstance(default, Mapping):
            rule = TRAIN_RULES.get(key.partition(".")[2], TYPE_RULES.get(type(default)))
            if not rule or findings.step(rule, key, given[name]) is not FAILED:
                train[name] = given[name]
        elif not isinstance(given[name], Mapping):
            findings.add(
                ConfigError(key, given[name], "is no group of keys", f"use {key}.NAME=VALUE")
            )
        elif name == "ddp":  # DistributedDataParallel's own options
            train[name] = OmegaConf.merge(train[name], given[name])
        else:
            _fill(train[name], given[name], default, key, findings)
    for name in sorted(set(given) - set(known)):
        value = "???" if OmegaConf.is_missing(given, name) else given[name]
        findings.add(
            ConfigError(f"{group}.{name}", value, "no such key", f"use one of {', '.join(known)}")
        )


def _drop_idle_teacher(model: DictConfig, findings: Findings) -> None:
    """Without a stage that learns from it, a teacher is neither loaded nor run."""
    if model.get("teacher") is None or not isinstance(model.get("stages"), DictConfig):
        return
    for name, stage in model.stages.items():
        if name == "_target_":
            continue
        if not isinstance(stage, DictConfig) or "loss" not in stage:
            return  # reported where the stages are built
        loss = OmegaConf.select(stage, "loss._target_")
        try:
            loss = locate(loss) if isinstance(loss, str) else loss
        except ImportError:
            return
        if stage.get("weight", 1.0) and "teacher" in getattr(loss, "needs", ("teacher",)):
            return
    findings.warn(
        "model.teacher",
        model.teacher.get("config") if isinstance(model.teacher, DictConfig) else model.teacher,
        "no stage learns from it, so it is neither loaded nor run",
        "give a stage that needs a teacher a weight above 0",
    )
    model.teacher = None


def student_only(cfg: DictConfig) -> DictConfig:
    """A copy of ``cfg`` with the plain student as its model: evaluation needs no teacher."""
    cfg = cfg.copy()
    cfg.model = cfg.model.get("student", cfg.model)
    return cfg


def settle_own_data(cfg: DictConfig, findings: Findings) -> None:
    """Read and register the COCO-format data of ``cfg.data``, and count its classes.

    Sets ``data.num_classes``, to which the model refers (80 stands in for it where no file says it),
    and ``data.classes``, their names, which are saved with the run.

    Args:
        findings: takes what is wrong with the data or was repaired, and as its facts ``data`` and
            ``files`` for ``train`` and ``test`` a list of summaries; in ``data``, FAILED in place of
            refused ones.
    """
    train = findings.step(_read_own_data, cfg, "train", findings)
    classes = train.categories if train is not FAILED and train.categories else None
    val = findings.step(_read_own_data, cfg, "val", findings, classes)
    for split, data in (("train", train), ("test", val)):
        summaries = [] if data is FAILED else data.files
        ok = data is not FAILED and not data.errors
        findings.facts.setdefault("files", {})[split] = summaries
        findings.facts.setdefault("data", {})[split] = summaries if ok else [FAILED]
    if FAILED not in (train, val):
        _warn_of_overlap(train, val, findings)
    found = [x for x in (train, val) if x is not FAILED and x.categories]
    given = cfg.data.get("num_classes")
    if found and given not in (None, len(found[0].classes)):
        findings.add(
            ConfigError(
                "data.num_classes",
                given,
                f"contradicts the {len(found[0].classes)} categories of {cfg.data.train_json}",
                "leave it out: classes are counted",
            )
        )
    cfg.data.num_classes = len(found[0].classes) if found else 80
    cfg.data.classes = found[0].classes if found else None


def _read_own_data(
    cfg: DictConfig, split: str, findings: Findings, classes: Optional[Dict[int, str]] = None
) -> CocoData:
    """The data of a split, registered if nothing is wrong with them."""
    data, key, images_key = cfg.data, f"data.{split}_json", f"data.{split}_images"
    files, roots = (_paths(cfg, name, findings) for name in (key, images_key))
    if not files or not roots:
        return FAILED
    if len(roots) not in (1, len(files)):
        problem = f"names {len(roots)} folders for the {len(files)} files of {key}"
        raise ConfigError(images_key, roots, problem, "name one folder, or one for each file")
    reading = _reading(cfg, split, findings)
    found = read_coco(
        files,
        roots if len(roots) == len(files) else roots * len(files),
        key,
        images_key,
        train=split == "train",
        classes=classes,
        reading=reading,
    )
    for error in found.errors:
        findings.add(error)
    findings.warnings += found.warnings
    if not found.errors:
        found.register(f"{data.name}_{split}")
        for summary in found.files:
            if data.masks and not summary.has_masks:
                findings.add(
                    ConfigError(
                        key,
                        summary.json_file,
                        f"{summary.unmasked} of {summary.objects} objects have no segmentation, and "
                        "data.masks is true",
                        "use a config without masks, such as configs/custom_coco.py",
                    )
                )
    return found


def _paths(cfg: DictConfig, key: str, findings: Findings) -> List[str]:
    """The one or several paths of a key; none if it holds something else, which is reported."""
    value = OmegaConf.select(cfg, key)
    paths = list(value) if isinstance(value, ListConfig) else [value]
    if paths and all(isinstance(x, str) and x for x in paths):
        return [os.path.expanduser(x) for x in paths]
    findings.add(ConfigError(key, value, "is not set", f"add {key}=PATH to the command"))
    return []


def _reading(cfg: DictConfig, split: str, findings: Findings) -> Reading:
    data, key = cfg.data, "data.image_range"
    span = data.get("image_range")
    if span is not None:
        span = list(span) if isinstance(span, ListConfig) else [span]
        numbers = [x for x in span if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if len(span) != 2 or len(numbers) != 2 or not span[0] < span[1]:
            findings.add(ConfigError(key, span, "is no range", "use null or [lo,hi], lo below hi"))
            span = None
    repair = data.get("repair", True)
    findings.step(check_switch, "data.repair", repair)
    loader = "train" if split == "train" else "test"
    mapper = OmegaConf.select(cfg, f"dataloader.{loader}.mapper._target_")
    if isinstance(mapper, str):
        mapper = locate(mapper)
    most = data.get("max_size")
    return Reading(
        masks=bool(data.masks),
        repair=repair is not False,
        max_size=most if isinstance(most, int) else None,
        image_range=span,
        scales=isinstance(mapper, type) and issubclass(mapper, ImageMapper),
    )


def _warn_of_overlap(train: CocoData, val: CocoData, findings: Findings) -> None:
    both = len({*train.image_files} & {*val.image_files})
    if both and not {x.json_file for x in train.files} & {x.json_file for x in val.files}:
        findings.warn(
            val.files[0].key,
            ", ".join(x.json_file for x in val.files),
            f"{both} of its {len(val.image_files)} images are trained on, too: figures say little "
            "about other images",
            "use images held out of training",
        )
