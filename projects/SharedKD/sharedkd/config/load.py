"""LazyConfig helpers: a distillation pair in a few lines, own COCO-format data in four keys."""

import os
from typing import Any, Mapping, Sequence

from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import FAILED, ConfigError, Findings, collecting

from .build import not_set
from .defaults import GONE, TRAIN_DEFAULTS, TRAIN_RULES, TYPE_RULES
from .overrides import check_override, not_applicable
from .own_data import read_own_data

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
    """:func:`~sharedkd.config.own_data.read_own_data`, with its summaries as facts of ``findings``."""
    found = read_own_data(cfg, findings)
    findings.facts["files"] = {split: [x for x in them if x] for split, them in found.items()}
    findings.facts["data"] = {
        split: [FAILED if x is FAILED or x.refused else x for x in them]
        for split, them in found.items()
    }
