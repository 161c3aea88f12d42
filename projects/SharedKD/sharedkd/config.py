"""LazyConfig helpers: a distillation pair in a few lines, own COCO-format data in four keys."""

import os
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from .checks.overrides import check_override, not_applicable
from .checks.rules import check_choice, check_names, check_number, check_switch, check_text
from .data.coco import CocoSummary, check_coco, check_same_classes, register_coco
from .errors import FAILED, ConfigError, Findings, collecting
from .losses import CrossLayer, IdenticalLayer
from .meta_arch import SharedKD
from .running.nonfinite import POLICIES
from .running.writers import check_writers
from .stages import Stage, stage_dict
from .teacher import FrozenTeacher

__all__ = [
    "ONE_STAGE_WEIGHT",
    "TRAIN_DEFAULTS",
    "construct",
    "distill",
    "load_config",
    "override",
    "published_stages",
    "shared_kd_stages",
    "student_only",
]

#: What `train` may hold beyond Detectron2's own keys.  They apply to plain and distilled runs alike.
TRAIN_DEFAULTS = dict(
    output_dir="./output",  # folder of the run: log, metrics, checkpoints, config.yaml, run.json
    init_checkpoint="",  # the student's initial weights: ImageNet backbone or detector
    init_sha256="",  # of that file, verified; at least 8 hexadecimal digits
    trust_checkpoint=False,  # let that file, or the one to resume from, run what it asks for
    safetensors=False,  # write model_final.safetensors beside model_final.pth
    inherit=[],  # parts that the student copies from the teacher at the start: neck, head
    eval_teacher=False,  # evaluate the teacher before the first iteration
    max_iter=90000,  # length of the run in optimizer steps; the schedule scales with it
    amp=dict(
        enabled=False,  # mixed precision
        dtype=None,  # float16 or bfloat16; None: float16 on CUDA, else bfloat16
    ),
    channels_last=None,  # memory layout of student and maps, equal up to rounding; None: the faster one
    fold_norms=True,  # the student's frozen norms, in each step: faster, equal up to rounding
    fast_roi_align=True,  # RoIAlign in training on a CPU reads listed positions: faster, equal up to rounding
    fast_focal_loss=True,  # RetinaNet's and FCOS's on a CPU, value and gradient in one pass: faster, equal up to rounding
    keep_memory=True,  # on a CPU, use freed memory again instead of returning it: faster (glibc)
    activation_checkpointing=False,  # keep no activations of the student's blocks: less memory, more time
    compile=False,  # torch.compile for the student's bottom-up network
    clip_grad_norm=None,  # largest norm of the whole gradient; None: it is not clipped
    accumulate=1,  # batches per optimizer step
    on_nonfinite="stop",  # what an infinite or NaN loss or gradient does: stop, skip_step
    max_skipped_steps=10,  # in a row; one more stops the run
    watch_period=1000,  # iterations, or a fourth of the run, between looks at each term's share of the gradient; 0: never
    cudnn_benchmark=False,  # cuDNN tries its algorithms: faster for images of one size
    seed=0,  # negative: draw one, and write it into the saved config
    fast_dev_run=False,  # 20 iterations, one evaluation of 50 images, one checkpoint
    ddp=dict(
        broadcast_buffers=False,  # the first process's BatchNorm statistics to all, in each step
        find_unused_parameters=False,  # look for parameters that a step does not use
        fp16_compression=False,  # gradients travel in float16
    ),
    checkpointer=dict(
        period=5000,  # iterations between checkpoints
        max_to_keep=100,  # older ones are removed; None: all are kept
    ),
    on_save_error="stop",  # what a full disk or read-only folder does: stop, continue
    force_resume=False,  # resume although the model, its teacher or its stages have changed
    eval_period=5000,  # iterations between evaluations; 0: at the end alone
    log_period=20,  # iterations between log lines
    writers=[],  # what else gets the logged values, if it is installed: wandb, mlflow
    device="cuda" if torch.cuda.is_available() else "cpu",  # cuda where there is one
)

#: What values of `train` may be, where their type does not say it.
TRAIN_RULES: Dict[str, Callable[..., Any]] = {
    "output_dir": lambda key, x: check_text(key, x, empty=False),
    "init_checkpoint": lambda key, x: x is None or check_text(key, x),
    "max_iter": partial(check_number, least=1, whole=True),
    "channels_last": lambda key, x: x is None or check_switch(key, x),
    "amp.dtype": lambda key, x: x is None or check_choice(key, x, ("float16", "bfloat16")),
    "clip_grad_norm": partial(check_number, above=0, or_null=True),
    "accumulate": partial(check_number, least=1, whole=True),
    "on_nonfinite": lambda key, x: check_choice(key, x, POLICIES),
    "on_save_error": lambda key, x: check_choice(key, x, ("stop", "continue")),
    "seed": partial(check_number, most=2**32 - 1, whole=True),
    "checkpointer.period": partial(check_number, least=1, whole=True),
    "checkpointer.max_to_keep": partial(check_number, least=1, whole=True, or_null=True),
    "log_period": partial(check_number, least=1, whole=True),
    "writers": check_writers,
}
#: What they may be otherwise, by the type of their default.
TYPE_RULES: Dict[type, Callable[..., Any]] = {
    bool: check_switch,
    int: partial(check_number, least=0, whole=True),
    float: partial(check_number, least=0),
    str: check_text,
    list: check_names,
}


#: What the identical-layer part weighs for one-stage students; docs/results.md has the measurement.
ONE_STAGE_WEIGHT = 10.0


def published_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD as published: raw mean squared errors of all levels, weight 2, from start to end.

    Each of the two parts has this ``weight``.  Cross-layer distillation takes the backbone's
    stages, whose widths differ (our reading).
    """
    return L(stage_dict)(
        identical=L(Stage)(loss=L(IdenticalLayer)(ignore_padding=False), weight=weight),
        cross=L(Stage)(loss=L(CrossLayer)(tap="backbone", ignore_padding=False), weight=weight),
    )


def shared_kd_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD with this project's defaults; docs/results.md has the measurements behind them.

    Args:
        weight: of the identical-layer part; the cross-layer part weighs a twentieth of it.  The
            configs of one-stage detectors use :data:`ONE_STAGE_WEIGHT`.
    """
    return L(stage_dict)(
        identical=L(Stage)(
            loss=L(IdenticalLayer)(
                tap="fpn", strides=None, share="dense", distance="mse", normalize="instance"
            ),
            weight=weight,
            start=0,
            ramp=0,
            end=None,
            relative=False,
        ),
        cross=L(Stage)(
            loss=L(CrossLayer)(
                tap="backbone",
                strides=None,
                pairs="dense",
                direction="deep_to_shallow",
                distance="mse",
                normalize="instance",
            ),
            weight=weight / 20,
            start=0,
            ramp=0,
            end=None,
            relative=False,
        ),
    )


def distill(
    student: DictConfig,
    teacher: Optional[str] = None,
    weights: Optional[str] = None,
    stages: Optional[DictConfig] = None,
) -> DictConfig:
    """The config node of a pair, with the keys ``student``, ``teacher`` and ``stages``.

    Args:
        student: LazyConfig node of a plain detector.
        teacher, weights: see :class:`FrozenTeacher`; teacher None: teacher-free.
        stages: ``L(stage_dict)(name=L(Stage)(...), ...)``; None: :func:`shared_kd_stages`.
    """
    return L(SharedKD)(
        student=student,  # first: its random initialisation then equals the plain student's
        teacher=(
            None
            if teacher is None
            else L(FrozenTeacher)(
                config=teacher,
                weights=weights,
                fold=True,
                precision=None,
                compile=False,
                sha256=None,
                trust_checkpoint=False,
                cache=None,
            )
        ),
        stages=shared_kd_stages() if stages is None else stages,
        input_format="${dataloader.train.mapper.image_format}",
    )


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


def not_set(key: str) -> ConfigError:
    """What to say of a key that a config leaves to the command line."""
    return ConfigError(key, "???", "is not set", f"add {key}=... to the command")


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


def construct(node: DictConfig, key: str) -> Any:
    """Detectron2's ``instantiate``, which says of every part of the config that fails why it does.

    Args:
        node: a LazyConfig node.
        key: its place in the config.

    Raises:
        ConfigError: an unknown class, an unknown or missing option, or whatever a class raises; all
            that its parts raise.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(key, node, "is nothing that can be built", "use L(CLASS)(OPTION=...)")
    findings = Findings()
    findings.step(_check_target, node, key)
    parts: Dict[str, Any] = {}
    for name in node:  # in this order: they may draw random weights
        child = findings.step(_value, node, name, f"{key}.{name}")
        recursive = isinstance(child, DictConfig) and "_target_" in child
        parts[name] = findings.step(construct, child, f"{key}.{name}") if recursive else child
    findings.raise_errors()
    try:
        return instantiate(parts)
    except ConfigError as e:
        for each in e.errors:
            # Classes know their options, but not where they are in the config.
            findings.add(each.below(key) if each.key in parts else each)
    except Exception as e:
        reason = f"cannot be built: {str(e) or type(e).__name__}"
        target = node.get("_target_")
        target = target if isinstance(target, str) else getattr(target, "__name__", target)
        findings.add(ConfigError(key, target, reason, "correct this part of the config"))
    findings.raise_errors()


def _check_target(node: Mapping, key: str) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        return
    try:
        found = locate(target)
    except Exception:
        found = None
    if found is None:
        raise ConfigError(f"{key}._target_", target, "there is no such class", "correct its name")


def _value(node: Mapping, name: str, key: str) -> Any:
    if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
        raise not_set(key)
    try:
        return node[name]
    except Exception as e:  # a reference that leads nowhere
        raise ConfigError(key, "", f"cannot be read: {e}", "correct this key") from e


def settle_own_data(cfg: DictConfig, findings: Findings) -> None:
    """Check and register the COCO-format data of ``cfg.data``, and count its classes.

    Sets ``data.num_classes``, to which the model refers; 80 stands in for it where no file says it.

    Args:
        findings: takes what is wrong with the data, and as its fact ``data`` for ``train`` and
            ``test`` a list of summaries, FAILED in place of one that there is not.
    """
    summaries = {
        loader: findings.step(_check_own_data, cfg.data, split, findings)
        for loader, split in (("train", "train"), ("test", "val"))
    }
    findings.step(check_same_classes, *summaries.values())
    findings.facts["data"] = {loader: [summary] for loader, summary in summaries.items()}
    counts = [len(x.classes) for x in summaries.values() if x is not FAILED]
    given = cfg.data.get("num_classes")
    if counts and given not in (None, counts[0]):
        findings.add(
            ConfigError(
                "data.num_classes",
                given,
                f"contradicts the {counts[0]} categories of {cfg.data.train_json}",
                "leave it out: classes are counted",
            )
        )
    cfg.data.num_classes = (counts or [80])[0]


def _check_own_data(data: DictConfig, split: str, findings: Findings) -> CocoSummary:
    key = f"data.{split}_json"
    for name in (key, f"data.{split}_images"):
        value = data.get(name.partition(".")[2])
        if not value or not isinstance(value, str):
            findings.add(ConfigError(name, value, "is not set", f"add {name}=PATH to the command"))
    json_file, images = data.get(f"{split}_json"), data.get(f"{split}_images")
    if not (json_file and images and isinstance(json_file, str) and isinstance(images, str)):
        return FAILED
    where = (key, f"data.{split}_images")
    summary = check_coco(json_file, images, *where, train=split == "train", findings=findings)
    if summary is FAILED:
        return FAILED
    register_coco(f"{data.name}_{split}", json_file, images)
    if data.masks and not summary.has_masks:
        raise ConfigError(
            key,
            summary.json_file,
            f"{summary.unmasked} of {summary.objects} objects have no segmentation, and "
            "data.masks is true",
            "use a config without masks, such as configs/custom_coco.py",
        )
    return summary


def add_sharedkd_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHAREDKD`` to a classic config, whose META_ARCHITECTURE is then ``SharedKD``."""
    cfg.MODEL.SHAREDKD = CfgNode(
        dict(
            STUDENT="GeneralizedRCNN",
            TEACHER=dict(CONFIG="", WEIGHTS=None, SHA256=None, TRUST_CHECKPOINT=False),
            PUBLISHED=False,
        )
    )


def parts_from_cfg(cfg: CfgNode) -> Dict[str, Any]:
    """SharedKD's arguments from a classic config, see :func:`add_sharedkd_config`."""
    from detectron2.modeling import META_ARCH_REGISTRY

    keys = cfg.MODEL.SHAREDKD
    teacher = keys.TEACHER
    stages = published_stages() if keys.PUBLISHED else shared_kd_stages()
    return dict(
        student=META_ARCH_REGISTRY.get(keys.STUDENT)(cfg),
        teacher=(
            FrozenTeacher(
                teacher.CONFIG,
                teacher.WEIGHTS,
                sha256=teacher.SHA256,
                trust_checkpoint=teacher.TRUST_CHECKPOINT,
            )
            if teacher.CONFIG
            else None
        ),
        stages=instantiate(stages),
        input_format=cfg.INPUT.FORMAT,
    )
