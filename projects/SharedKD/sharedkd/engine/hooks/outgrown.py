"""Says when the student has become as good as a teacher."""

import logging
from typing import Any, Dict, Mapping, Optional

from detectron2.engine import hooks
from detectron2.utils import comm

__all__ = ["Outgrown", "ap_of"]

logger = logging.getLogger("detectron2.sharedkd")


class Outgrown(hooks.HookBase):
    """Compares the student's AP with the teachers' after each evaluation.

    A student is level with a teacher when it has at least the teacher's AP in every task that both were
    evaluated for.  This is logged once.  Stages with ``end="teacher"`` that learn from this teacher
    are off from the next iteration on (:meth:`SharedKDTrainer.stage_weights`).

    Attributes:
        teachers: teacher's name, None for ``model.teacher`` -> task -> AP.
        iterations: teacher's name -> the iteration after which the student was level.
    """

    def __init__(self) -> None:
        self.teachers: Dict[Optional[str], Dict[str, float]] = {}
        self.iterations: Dict[Optional[str], int] = {}

    def know(self, name: Optional[str], results: Mapping[str, Mapping[str, Any]]) -> None:
        """Take a teacher's results, task -> metric -> value."""
        self.teachers[name] = ap_of(results)

    def compare(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare the student's ``results``; all ranks call it, and rank 0 has the results."""
        ours = ap_of(results)
        for name, theirs in self.teachers.items():
            tasks = theirs.keys() & ours.keys()
            level = bool(tasks) and all(ours[task] >= theirs[task] > 0 for task in tasks)
            if not comm.all_gather(level)[0] or name in self.iterations:
                continue
            self.iterations[name] = self.trainer.iter
            figures = ", ".join(f"{task} {ours[task]:.1f} and {theirs[task]:.1f}" for task in tasks)
            ends = [
                x
                for x, s in self.trainer.stages.items()
                if s.end == "teacher" and s.teacher == name
            ]
            who = "the teacher" if name is None else f"teacher {name}"
            text = f"The student is level with {who} (AP of both: {figures})"
            if self.trainer.stages:
                ending = "end=teacher would end a stage here"
                ending = f"{', '.join(ends)} end here" if ends else ending
                text += f": it has little left to learn from it; {ending}"
            logger.warning(text)

    def state_dict(self) -> Dict[str, Any]:
        return {"teachers": self.teachers, "iterations": self.iterations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.teachers, self.iterations = dict(state["teachers"]), dict(state["iterations"])


def ap_of(results: Mapping[str, Any]) -> Dict[str, float]:
    """Task -> AP in an evaluation's results."""
    return {
        task: metrics["AP"]
        for task, metrics in results.items()
        if isinstance(metrics, Mapping) and "AP" in metrics
    }
