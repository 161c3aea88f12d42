"""A pair that a classic yaml config describes, see :func:`sharedkd.config.classic.add_sharedkd_config`."""

from typing import Any, Dict, Optional, Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import DistillationLoss
from sharedkd.weights.loading import inherit, parts_of

from .classes import check_class_names, registered_classes, saved_classes
from .detectors import family, num_classes, read_config
from .recipes import START, multiply, stages_of
from .stages import TIMES
from .teachers import FrozenTeacher

__all__ = ["arguments_of"]


def arguments_of(cfg: CfgNode) -> Dict[str, Any]:
    """The arguments of :class:`~sharedkd.modeling.meta_arch.SharedKD`, the student with its start.

    Raises:
        ConfigError: see the functions that this calls; no teacher for the start, or a start that gives
            nothing and no loss; a teacher whose class scores mean other classes.
    """
    keys = cfg.MODEL.SHAREDKD
    if keys.END == "teacher":
        problem, fix = "is known to this package's trainer only", "use a time or null"
        raise ConfigError("MODEL.SHAREDKD.END", keys.END, problem, fix)
    student = META_ARCH_REGISTRY.get(keys.STUDENT)(cfg)
    stages = stages_of(keys.METHOD, family(student))
    times = {x: keys[x.upper()] for x in TIMES if keys[x.upper()] is not None}
    for name in stages.keys() - {"_target_"}:
        multiply(stages[name], keys.WEIGHT)
        stages[name].update(times)
    if keys.METHOD == START and not keys.TEACHER.CONFIG:
        fix = "set it, or use MODEL.META_ARCHITECTURE: " + keys.STUDENT
        raise ConfigError("MODEL.SHAREDKD.TEACHER.CONFIG", "''", "there is no teacher", fix)
    stages = instantiate(stages)
    losses = [stage.loss for stage in stages.values()]
    return dict(
        student=student,
        teacher=_teacher_of(cfg, student, losses) if keys.TEACHER.CONFIG else None,
        stages=stages,
        input_format=cfg.INPUT.FORMAT,
        max_iter=cfg.SOLVER.MAX_ITER,
    )


def _teacher_of(
    cfg: CfgNode, student: nn.Module, losses: Sequence[DistillationLoss]
) -> Optional[FrozenTeacher]:
    """The teacher, ready on its device; None if it gives the start alone."""
    keys, parts = cfg.MODEL.SHAREDKD.TEACHER, cfg.MODEL.SHAREDKD.INHERIT
    teacher = FrozenTeacher(
        keys.CONFIG,
        keys.WEIGHTS,
        precision=keys.PRECISION,
        sha256=keys.SHA256,
        trust_checkpoint=keys.TRUST_CHECKPOINT,
    ).to(cfg.MODEL.DEVICE)
    key = "MODEL.SHAREDKD.INHERIT"
    copied = inherit(student, teacher.model, parts, teacher.scale, key) if parts else ()
    dense = not hasattr(student, "roi_heads")
    if "head" in parts_of(copied) or any(loss.reads_scores(dense) for loss in losses):
        _check_classes(cfg, student, teacher)
    if cfg.MODEL.SHAREDKD.METHOD == START:
        if copied:
            return None
        problem = "gives the student nothing of the teacher, and there is no distillation loss"
        raise ConfigError(key, list(parts), problem, "use MODEL.SHAREDKD.METHOD: shared_kd")
    # Detectron2's AMPTrainer computes in float16.
    teacher.prepare(torch.float16 if cfg.SOLVER.AMP.ENABLED else None)
    return teacher


def _check_classes(cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher) -> None:
    """Refuse a teacher whose class scores mean other classes than the data's, where both are known."""
    ours = registered_classes(cfg.DATASETS.TRAIN, unloaded=True)
    theirs = saved_classes(read_config(teacher.name), unloaded=True)
    count = num_classes(student)
    known = ours is not None and theirs is not None
    if known and len(ours) == len(theirs) == count == num_classes(teacher.model):
        key = "MODEL.SHAREDKD.TEACHER.CONFIG"
        otherwise = "use MODEL.SHAREDKD.INHERIT: [neck] and a method that compares maps alone"
        check_class_names(key, teacher.name, theirs, ours, otherwise)
