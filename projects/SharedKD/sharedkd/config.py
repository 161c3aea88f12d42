"""LazyConfig helpers: a distillation pair in a few lines, own COCO-format data in four keys."""

import os
from typing import Any, Dict, Optional

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from .data.coco import check_coco, check_same_classes, register_coco
from .errors import ConfigError
from .losses import CrossLayer, IdenticalLayer
from .meta_arch import SharedKD
from .stages import Stage, stage_dict
from .teacher import FrozenTeacher

__all__ = [
    "ONE_STAGE_WEIGHT",
    "TRAIN_DEFAULTS",
    "construct",
    "distill",
    "load_config",
    "published_stages",
    "shared_kd_stages",
    "student_only",
]

#: What `train` may hold beyond Detectron2's own keys.  They apply to plain and distilled runs alike.
TRAIN_DEFAULTS = dict(
    output_dir="./output",
    init_checkpoint="",  # the student's initial weights: ImageNet backbone or detector
    inherit=[],  # parts that the student copies from the teacher at the start: neck, head
    eval_teacher=False,  # evaluate the teacher before the first iteration
    max_iter=90000,
    amp=dict(
        enabled=False, dtype=None
    ),  # dtype: float16, bfloat16; None: float16 on CUDA, else bfloat16
    channels_last=True,  # memory layout of student and teacher: faster convolutions, equal up to rounding
    activation_checkpointing=False,  # keep no activations of the student's blocks: less memory, more time
    compile=False,  # torch.compile for the student's bottom-up network
    clip_grad_norm=None,  # largest norm of the whole gradient
    accumulate=1,  # batches per optimizer step
    cudnn_benchmark=False,
    seed=0,  # negative: draw one, and write it into the saved config
    fast_dev_run=False,  # 20 iterations, one evaluation of 50 images, one checkpoint
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=5000,
    log_period=20,
    device="cuda" if torch.cuda.is_available() else "cpu",
)


#: What the identical-layer part weighs for one-stage students; docs/results.md has the measurement.
ONE_STAGE_WEIGHT = 10.0


def published_stages(weight: float = 2.0) -> DictConfig:
    """Shared-KD as published: raw mean squared errors of all levels, weight 2, from start to end.

    Cross-layer distillation takes the backbone's stages, whose widths differ (our reading).
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
                config=teacher, weights=weights, fold=True, precision=None, compile=False
            )
        ),
        stages=shared_kd_stages() if stages is None else stages,
        input_format="${dataloader.train.mapper.image_format}",
    )


def load_config(
    path: str, overrides=(), keep_teacher: bool = False, without_data: bool = False
) -> DictConfig:
    """Read a LazyConfig, apply ``key=value`` overrides, fill in defaults, settle own data.

    Args:
        keep_teacher: also one that no stage learns from; else it is neither loaded nor run.
        without_data: nothing will be loaded; own data that is not named has COCO's 80 classes.

    Raises:
        ConfigError: no such file, an override that cannot be applied, or bad own data.
    """
    if not os.path.isfile(path):
        raise ConfigError("--config-file", path, "no such file", "name a config, see configs/")
    try:
        cfg = LazyConfig.load(path)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError("--config-file", path, f"cannot be read: {e}", "correct that file") from e
    known = {*cfg, "train"}
    for override in overrides:
        try:
            cfg = LazyConfig.apply_overrides(cfg, [override])
        except Exception as e:
            raise ConfigError(
                "override",
                override,
                f"cannot be applied: {e}",
                "write key=value, and a value with special characters as key=\"'value'\"",
            ) from e
        for key in sorted(set(cfg) - known):
            raise ConfigError(
                "override",
                override,
                f"{path} has no {key}",
                f"use one of {', '.join(sorted(known))}",
            )
    for key in ("model", "dataloader", "optimizer", "lr_multiplier"):
        if key not in cfg:
            raise ConfigError(
                "--config-file", path, f"has no `{key}`", "start from a file of configs/"
            )
    _check_known("train", cfg.get("train", {}), TRAIN_DEFAULTS)
    for group in ("amp", "checkpointer"):
        given = cfg.get("train", {}).get(group, {})
        _check_known(f"train.{group}", given, TRAIN_DEFAULTS[group])
    cfg.train = OmegaConf.merge(OmegaConf.create(TRAIN_DEFAULTS), cfg.get("train", {}))
    if cfg.train.fast_dev_run:
        cfg.train.max_iter = cfg.train.eval_period = 20
        cfg.train.log_period = 1
        cfg.train.eval_teacher = False
        cfg.train.checkpointer.period = 10**9  # the final one is the only one
        batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
        if batch:
            cfg.dataloader.train.total_batch_size = min(batch, 2 * comm.get_world_size())
    if "data" in cfg and without_data:
        cfg.data.num_classes = cfg.data.num_classes or 80
    elif "data" in cfg:
        settle_own_data(cfg)
    if not (keep_teacher or cfg.train.inherit or cfg.train.eval_teacher):
        _drop_idle_teacher(cfg.model)
    return cfg


def _check_known(group: str, given, known) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{group}.{key}", given[key], "no such key", f"use one of {', '.join(known)}"
            )


def _drop_idle_teacher(model: DictConfig) -> None:
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
    model.teacher = None


def student_only(cfg: DictConfig) -> DictConfig:
    """The config with the plain student as its model: what evaluation needs, without a teacher."""
    cfg = cfg.copy()
    cfg.model = cfg.model.get("student", cfg.model)
    return cfg


def construct(node: DictConfig, key: str) -> Any:
    """Detectron2's ``instantiate``, whose failure names the smallest part of the config that fails.

    Args:
        node: a LazyConfig node.
        key: its place in the config.

    Raises:
        ConfigError: an unknown class, an unknown or missing option, or whatever a class raises.
    """
    try:
        return instantiate(node)
    except ConfigError:
        raise
    except Exception as e:
        for name, child in node.items():
            if isinstance(child, DictConfig) and "_target_" in child:
                construct(child, f"{key}.{name}")
        raise ConfigError(
            key, node.get("_target_"), f"cannot be built: {e}", "correct this part of the config"
        ) from e


def settle_own_data(cfg: DictConfig) -> None:
    """Check and register the COCO-format data of ``cfg.data``, and count its classes.

    Sets ``data.num_classes``, to which the model refers.

    Raises:
        ConfigError: a key is not set, or see :mod:`sharedkd.data.coco`.
    """
    data = cfg.data
    for key in ("train_json", "val_json", "train_images", "val_images"):
        if not data.get(key):
            raise ConfigError(
                f"data.{key}", data.get(key), "is not set", f"add data.{key}=PATH to the command"
            )
    summaries = {}
    for split in ("train", "val"):
        json_file, images = data[f"{split}_json"], data[f"{split}_images"]
        summaries[split] = check_coco(
            json_file, images, f"data.{split}_json", f"data.{split}_images", train=split == "train"
        )
        register_coco(f"{data.name}_{split}", json_file, images)
    check_same_classes(summaries["train"], summaries["val"])
    for split, summary in summaries.items():
        if data.masks and not summary.has_masks:
            raise ConfigError(
                f"data.{split}_json",
                summary.json_file,
                f"{summary.unmasked} of {summary.objects} objects have no segmentation, and "
                "data.masks is true",
                "use a config without masks, such as configs/custom_coco.py",
            )
    data.num_classes = len(summaries["train"].classes)


def add_sharedkd_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHAREDKD`` to a classic config, whose META_ARCHITECTURE is then ``SharedKD``."""
    cfg.MODEL.SHAREDKD = CfgNode(
        dict(STUDENT="GeneralizedRCNN", TEACHER=dict(CONFIG="", WEIGHTS=None), PUBLISHED=False)
    )


def parts_from_cfg(cfg: CfgNode) -> Dict[str, Any]:
    """SharedKD's arguments from a classic config, see :func:`add_sharedkd_config`."""
    from detectron2.modeling import META_ARCH_REGISTRY

    keys = cfg.MODEL.SHAREDKD
    teacher = keys.TEACHER
    stages = published_stages() if keys.PUBLISHED else shared_kd_stages()
    return dict(
        student=META_ARCH_REGISTRY.get(keys.STUDENT)(cfg),
        teacher=FrozenTeacher(teacher.CONFIG, teacher.WEIGHTS) if teacher.CONFIG else None,
        stages=instantiate(stages),
        input_format=cfg.INPUT.FORMAT,
    )
