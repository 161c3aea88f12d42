"""Evaluators whose files a full disk may refuse."""

import copy
import os
import tempfile
from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional

from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from omegaconf import ListConfig

from sharedkd.files import disk_errors

__all__ = ["Handled", "build_evaluators"]

#: Takes what is written, and is the context that decides what becomes of a disk's refusal.
Handled = Callable[[str], ContextManager]

ROOM = 2**20  # bytes: a disk without them is full


def build_evaluators(nodes: Any, handled: Handled) -> List[DatasetEvaluator]:
    """The evaluators of ``nodes``, the config's ``dataloader.evaluator``: one or a list of them.

    One with an ``output_dir`` that cannot be written to gives its metrics without its files, if
    ``handled`` lets it.  Detectron2 writes in between: a disk that fills up only then takes the metrics
    with it.

    Raises:
        whatever ``handled`` makes of an OSError.
    """
    return [_build(x, handled) for x in (nodes if isinstance(nodes, ListConfig) else [nodes])]


def _build(node: Any, handled: Handled) -> DatasetEvaluator:
    folder = node.get("output_dir") if isinstance(node, Mapping) else None
    if not folder:
        return instantiate(node)
    what = f"the evaluator's results in {folder}"
    with handled(what):
        if comm.is_main_process():  # no other one writes
            _try_to_write(folder)
        return _Guarded(instantiate(node), handled, what)
    node = copy.deepcopy(node)
    node.output_dir = None
    return instantiate(node)


def _try_to_write(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as f:
        f.write(bytes(ROOM))


class _Guarded(DatasetEvaluator):
    """Gives no metrics where the disk refuses its files, if ``handled`` lets it."""

    def __init__(self, evaluator: DatasetEvaluator, handled: Handled, what: str):
        self.evaluator, self.handled, self.what = evaluator, handled, what

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        with self.handled(self.what), disk_errors():
            return self.evaluator.evaluate()
        return {}
