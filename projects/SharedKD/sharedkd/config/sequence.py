"""Several teachers one after the other, as stages of a config."""

from typing import Optional, Sequence

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from sharedkd.errors import ConfigError
from sharedkd.modeling.stages import stage_dict

__all__ = ["sequence"]


def sequence(stages: DictConfig, teachers: Sequence[Optional[str]]) -> DictConfig:
    """The same stages with one teacher after the other, from near to the student to far from it.

    Teachers take turns of equal length, each stage under the name ``<stage>_<teacher>``.  A loss with
    parameters begins anew with each of them, and a weight that sets itself is measured anew.

    Progressive distillation: Learning Lightweight Object Detectors via Multi-Teacher Progressive
    Distillation (ICML 2023).  Turns of equal length are our choice.

    Example::

        model.stages = sequence(L(stage_dict)(pkd=L(Stage)(loss=L(PKD)(), weight=10.0)), ["near", "far"])

    Args:
        stages: config node of the stages, without times of their own.
        teachers: their names in ``model.teachers``, in order; None is ``model.teacher``.

    Raises:
        ConfigError: no teachers, one of them twice, or a stage that has a start or an end.
    """
    if not teachers or len({*teachers}) < len(teachers):
        fix = "name each of model.teachers once, from near to far"
        raise ConfigError("teachers", list(teachers), "is no list of different teachers", fix)
    found, turns = L(stage_dict)(), len(teachers)
    for name, stage in stages.items():
        if name == "_target_":
            continue
        if stage.get("start") or stage.get("end") is not None:
            problem, fix = "has times of its own", "leave out its start and end"
            raise ConfigError(f"stages.{name}", "start, end", problem, fix)
        for turn, teacher in enumerate(teachers):
            ends = None if turn == turns - 1 else (turn + 1) / turns
            times = {"start": turn / turns, "end": ends}
            found[f"{name}_{teacher or 'teacher'}"] = {**stage, **times, "teacher": teacher}
    return found
