"""Evaluators whose files a full disk may refuse."""

from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional

from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator
from omegaconf import ListConfig

from sharedkd.files import disk_errors

__all__ = ["Handled", "build_evaluators"]

#: Takes what is written, and is the context that decides what becomes of a disk's refusal.
Handled = Callable[[str], ContextManager]


def build_evaluators(nodes: Any, handled: Handled) -> List[DatasetEvaluator]:
    """The evaluators of ``nodes``, the config's ``dataloader.evaluator``: one or a list of them.

    One with an ``output_dir`` that cannot be written to has no metrics, if ``handled`` does not raise.
    """
    return [_build(x, handled) for x in (nodes if isinstance(nodes, ListConfig) else [nodes])]


def _build(node: Any, handled: Handled) -> DatasetEvaluator:
    folder = node.get("output_dir") if isinstance(node, Mapping) else None
    evaluator = instantiate(node)
    return _Guarded(evaluator, handled, folder) if folder else evaluator


class _Guarded(DatasetEvaluator):
    """Lets ``handled`` decide what becomes of an OSError; all else is as in ``evaluator``."""

    def __init__(self, evaluator: DatasetEvaluator, handled: Handled, folder: str):
        self.evaluator, self.handled, self.folder = evaluator, handled, folder

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        with self.handled(f"the evaluator's results in {self.folder}"), disk_errors():
            return self.evaluator.evaluate()
        return {}
