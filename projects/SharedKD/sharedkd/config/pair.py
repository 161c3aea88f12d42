"""A distillation pair made of a plain detector's config."""

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

from detectron2.config import LazyCall as L
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.stages import stage_dict
from sharedkd.modeling.teachers import FrozenTeacher, Teacher
from sharedkd.weights.loading import PARTS

from .build import makes, target_of
from .methods import DEFAULT, OWN, START, with_method
from .shared_kd import shared_kd_stages

__all__ = ["IMAGE_FORMAT", "Pairing", "distill"]

IMAGE_FORMAT = (
    "dataloader.train.mapper.image_format"  #: where a config says the loader's channel order
)


@dataclass(frozen=True)
class Pairing:
    """What to distil a config's detector with: the overrides ``distill.teacher=...`` and so on.

    The flags ``--teacher``, ``--teacher-weights``, ``--method`` and ``--depth`` of the tools stand for them.

    Args:
        teacher: a model-zoo name, a config's path, or the folder of a run.
        weights: the teacher's weights; None: those of a model-zoo name, or the last of a run's folder.
        method: as :func:`~sharedkd.config.methods.with_method` takes it.  None: :data:`DEFAULT` for a plain
            detector, and the stages of a pair's own config.
        depth: of the detector's ResNet, see :func:`~sharedkd.config.depth.set_depth`; None: the config's.
    """

    teacher: Optional[str] = None
    weights: Optional[str] = None
    method: Optional[str] = None
    depth: Optional[str] = None

    @classmethod
    def of(cls, overrides: Sequence[str]) -> Tuple["Pairing", List[str]]:
        """Read the pairing among ``overrides``, and return the other overrides beside it.

        Raises:
            ConfigError: an override of an unknown key of ``distill``.
        """
        keys, others = {}, []
        for text in overrides:
            key, _, value = text.partition("=")
            group, _, name = key.partition(".")
            if group != "distill":
                others.append(text)
            elif name in cls.__dataclass_fields__:
                keys[name] = value
            else:
                known = ", ".join(f"distill.{x}" for x in cls.__dataclass_fields__)
                raise ConfigError("override", text, "there is no such key", f"use one of {known}")
        return cls(**keys), others

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.teacher, self.weights, self.method))

    def apply(self, cfg: DictConfig) -> DictConfig:
        """Make a pair of a plain detector's config, or give a pair another teacher or method.

        Args:
            cfg: with the group ``model``; not changed.

        Raises:
            ConfigError: weights without a teacher, a teacher in place of one of another kind, or see
                :func:`~sharedkd.config.methods.with_method`.
        """
        if not self:
            return cfg
        cfg, method = cfg.copy(), self.method
        own = OmegaConf.select(cfg, "model.teacher")
        if self.teacher is None and self.weights is not None and own is not None:
            own.weights = self.weights
            return with_method(cfg, method or OWN)
        if self.teacher is None and self.weights is not None:
            fix = "name its config by --teacher"
            raise ConfigError("--teacher-weights", self.weights, "there is no teacher", fix)
        if "student" not in cfg.model:
            cfg.model = distill(cfg.model, self.teacher, self.weights, L(stage_dict)())
            if self.teacher is not None:
                OmegaConf.update(cfg, "train.inherit", [*PARTS], force_add=True)
            # The node has no stages yet, as `inherit` has none.
            method = OWN if method == START else method or DEFAULT
            if OmegaConf.select(cfg, IMAGE_FORMAT) is None:  # a mapper that does not say it
                cfg.model.input_format = cfg.model.student.get("input_format", "BGR")
        elif self.teacher is not None:
            if makes(own, Teacher) and not makes(own, FrozenTeacher):
                kind = target_of(own).__name__
                problem = f"would take the place of this config's own, a {kind}"
                fix = "leave it out, or set model.teachers.NAME for a stage that names it"
                raise ConfigError("--teacher", self.teacher, problem, fix)
            cfg.model.teacher = _teacher_node(self.teacher, self.weights)
        return with_method(cfg, method or OWN)


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
        teacher=None if teacher is None else _teacher_node(teacher, weights),
        stages=shared_kd_stages() if stages is None else stages,
        input_format=f"${{{IMAGE_FORMAT}}}",
    )


def _teacher_node(config: str, weights: Optional[str]) -> DictConfig:
    return L(FrozenTeacher)(
        config=config,
        weights=weights,
        fold=True,
        precision=None,
        compile=False,
        sha256=None,
        trust_checkpoint=False,
    )
