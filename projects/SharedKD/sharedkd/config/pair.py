"""A distillation pair's config node, made of a plain detector's."""

from typing import Optional

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.shared_kd import shared_kd_stages
from sharedkd.modeling.teachers import FrozenTeacher

__all__ = ["distill"]


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
            )
        ),
        stages=shared_kd_stages() if stages is None else stages,
        input_format="${dataloader.train.mapper.image_format}",
    )
