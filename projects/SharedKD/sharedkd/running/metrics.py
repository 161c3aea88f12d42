"""metrics.json and TensorBoard's events, which an interruption leaves as if it had not been."""

import os
from functools import partial
from typing import Any, Callable, Dict, List

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from fvcore.common.history_buffer import HistoryBuffer

from ..checkpoints.saving import SaveErrors

__all__ = ["Metrics"]

FILE = "metrics.json"
KEPT = 1000  # values of each scalar in memory, where Detectron2 keeps a million
WINDOW = 20  # values of which the writers log the median
# What a clock measured is not repeated.
CLOCKS = ("time", "data_time", "rank_data_time", "eta_seconds")


class Metrics(hooks.PeriodicWriter):
    """Writes what was logged; its state lets a resumed run write the lines of the uninterrupted one.

    Every checkpoint has the values of which the next lines are medians, and how many lines there were:
    a run that goes on from it removes those that came later.  TensorBoard's events of the same steps
    stay in their files and are hidden (``purge_step``).

    Args:
        folder: the run's output folder.
        max_iter: length of the run, for the time that is left.
        period: iterations between two lines.
        errors: what to do if they cannot be written.
        more: opens further writers, see :func:`~sharedkd.running.writers.open_writers`; they have the
            attribute ``_last_write``, as Detectron2's own.
    """

    def __init__(
        self,
        folder: str,
        max_iter: int,
        period: int,
        errors: SaveErrors,
        more: Callable[[int, int], List[EventWriter]] = lambda first, window: [],
    ):
        super().__init__([], period)
        self.more = more
        self.path = os.path.join(folder, FILE)
        self.max_iter, self.errors = max_iter, errors
        self.loaded: Dict[str, Any] = {}

    def _open(self, first: int) -> List[EventWriter]:
        return [
            CommonMetricPrinter(self.max_iter, WINDOW),
            JSONWriter(self.path, WINDOW),
            TensorboardXWriter(os.path.dirname(self.path), WINDOW, purge_step=first or None),
            *self.more(first, WINDOW),
        ]

    def before_train(self) -> None:
        start, storage = self.trainer.start_iter, self.trainer.storage
        storage.histories().default_factory = partial(HistoryBuffer, KEPT)
        if comm.is_main_process():
            with self.errors.handled(FILE):
                if self.loaded or start == 0:
                    _keep_lines(self.path, self.loaded.get("lines", 0))
                # A resumed run may still have to log the iteration of its checkpoint.
                self._writers = self._open(max(0, start - 1))
        for name, smoothed, history in self.loaded.get("scalars", ()):
            for value, storage.iter in history:
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = start
        for writer in self._files:
            writer._last_write = self.loaded.get("written", -1)

    def after_step(self) -> None:
        now = self.trainer.iter + 1
        if now % self._period == 0 or now == self.trainer.max_iter:
            self._write(self._writers)

    def after_train(self) -> None:
        self._write(self._files)  # the console's writer fails if it is asked twice in a step
        for writer in self._writers:
            with self.errors.handled(_name(writer)):
                writer.close()

    def _write(self, writers: List[EventWriter]) -> None:
        for writer in writers:
            with self.errors.handled(_name(writer)):
                writer.write()

    @property
    def _files(self) -> List[EventWriter]:
        return [w for w in self._writers if not isinstance(w, CommonMetricPrinter)]

    def state_dict(self) -> Dict[str, Any]:
        """Plain numbers, strings and lists."""
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            "scalars": [
                [name, hints[name], [list(x) for x in storage.history(name).values()[-WINDOW:]]]
                for name in storage.latest()
                if name not in CLOCKS
            ],
            "written": max((w._last_write for w in self._files), default=-1),
            "lines": _count_lines(self.path),
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.loaded = state


def _name(writer: EventWriter) -> str:
    return FILE if isinstance(writer, JSONWriter) else f"what {type(writer).__name__} writes"


def _count_lines(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as f:
        return sum(1 for _ in f)


def _keep_lines(path: str, count: int) -> None:
    """Cut a file behind its first ``count`` complete lines."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as f:
        size = 0
        for _, line in zip(range(count), f):
            size += len(line) if line.endswith(b"\n") else 0
        f.truncate(size)
