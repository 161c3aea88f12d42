"""metrics.json and TensorBoard's events, which an interruption leaves as if it had not been."""

import io
import os
import socket
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, Callable, Dict, List, Optional

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from fvcore.common.history_buffer import HistoryBuffer
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

from sharedkd.engine.checkpoint import SaveErrors

__all__ = ["Metrics"]

FILE = "metrics.json"
KEPT = 1000  # values of each scalar in memory, where Detectron2 keeps a million
MOST_WAITING = 2**20  # bytes of events, while the disk takes none
WINDOW = 20  # values of which the writers log the median
# What a clock measured is not repeated.
CLOCKS = ("time", "data_time", "rank_data_time", "eta_seconds")


class EventFile:
    """TensorBoard's events in a file, which has what was added once it is flushed, or is as before.

    TensorBoard leaves its files to a thread: a full disk ends it for good and with a traceback, and
    what follows a half event is not read.
    """

    def __init__(self, folder: str):
        self.folder, self.waiting = folder, io.BytesIO()
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = os.path.join(folder, name)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return self.folder

    def add_event(self, event: Event) -> None:
        if self.waiting.tell() < MOST_WAITING:
            RecordWriter(self.waiting).write(event.SerializeToString())

    def flush(self) -> None:
        """Raises:
        OSError: it cannot be written; what is waiting waits for the next time.
        """
        left = self.waiting.getvalue()
        with open(self.path, "ab", buffering=0) as f:
            end = f.tell()
            try:
                while left:
                    left = left[f.write(left) :]
            except OSError:
                f.truncate(end)
                raise
        self.waiting = io.BytesIO()

    close = flush


class _FileWriter(FileWriter):
    def __init__(self, folder: str):
        self.event_writer = EventFile(folder)


class _SummaryWriter(SummaryWriter):
    file_writer: Optional[_FileWriter]

    def _get_file_writer(self) -> _FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(session_log=start), self.purge_step)
        return self.file_writer


class Events(TensorboardXWriter):
    """Detectron2's writer of them; on the disk whenever the lines of metrics.json are.

    Args:
        folder: the run's output folder.
        window: values of which the median is written.
        first: the first iteration that will be written; earlier events of it and of later ones are
            hidden.
    """

    def __init__(self, folder: str, window: int, first: int):
        self._window_size, self._last_write = window, -1
        self._writer = _SummaryWriter(folder, purge_step=first or None)

    def write(self) -> None:
        super().write()
        self._writer.flush()


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
        more: opens further writers, see :func:`~sharedkd.engine.hooks.writers.open_writers`; they have the
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

    def _open(self, first: int) -> None:
        self._writers = [
            CommonMetricPrinter(self.max_iter, WINDOW),
            Events(os.path.dirname(self.path), WINDOW, first),
        ]
        with self.errors.handled(FILE):
            if self.loaded or self.trainer.start_iter == 0:
                _keep_lines(self.path, self.loaded.get("lines", 0))
            self._writers.append(JSONWriter(self.path, WINDOW))
        with self.errors.handled("what train.writers need"):
            self._writers += self.more(first, WINDOW)

    def before_train(self) -> None:
        start, storage = self.trainer.start_iter, self.trainer.storage
        storage.histories().default_factory = partial(HistoryBuffer, KEPT)
        if comm.is_main_process():
            # A resumed run may still have to log the iteration of its checkpoint.
            self._open(max(0, start - 1))
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
        with ExitStack() as closing:  # all of them, whatever the others raise
            for writer in self._writers:
                closing.callback(self._close, writer)
            self._write(self._files)  # the console's writer fails if it is asked twice in a step

    def _close(self, writer: EventWriter) -> None:
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
        """Before training: go on from ``state``, that of :meth:`state_dict` in a checkpoint."""
        self.loaded = state


def _name(writer: EventWriter) -> str:
    known = {JSONWriter: FILE, Events: "TensorBoard's events"}
    return known.get(type(writer), f"what {type(writer).__name__} writes")


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
