"""The progress of long work in one line: rewritten on a terminal, repeated now and then in a log."""

import math
import os
import re
import shutil
import sys
import time
from datetime import timedelta
from typing import Callable, NamedTuple, Optional, TextIO

__all__ = ["LiveLine", "Progress", "Remaining", "progress_in"]

PERIOD = 60  # seconds between two lines in a log
CLEAR = "\r\x1b[K"  # the terminal's line

# The lines of a run's log that tell its progress.
_TRAINING = re.compile(r"(?:eta: (?P<eta>.+?)\s+)?iter: (?P<iter>\d+)\s.*total_loss: (?P<loss>\S+)")
_DISTILLED = re.compile(r"loss_distill_\S+: (\S+)")
_TESTING = re.compile(r"Inference done (?P<done>\d+/\d+)\..*ETA=(?P<eta>\S+)")


class Progress(NamedTuple):
    """A line about a run."""

    text: str
    fraction: float  # of its training that is done
    is_last: bool = False  # about the last iteration, which is always logged

    def __str__(self) -> str:
        return self.text


def progress_in(line: str, iterations: int) -> Optional[Progress]:
    """The progress in a ``line`` of Detectron2's log of so many iterations; None for most lines."""
    found = _TRAINING.search(line)
    if found:
        done = int(found["iter"]) + 1
        eta = f"   {found['eta']} left" if found["eta"] else ""
        terms = [float(x) for x in _DISTILLED.findall(line)]
        of_it = f" ({sum(terms):.4g} distillation)" if terms else ""
        text = f"iteration {done}/{iterations}   loss {found['loss']}{of_it}{eta}"
        return Progress(text, done / iterations, is_last=done == iterations)
    found = _TESTING.search(line)
    return Progress(f"evaluation {found['done']}   {found['eta']} left", 1.0) if found else None


class LiveLine:
    """Progress on a stream, by default the console.

    On a terminal each line replaces the one before.  In a file, a pipe or a terminal without cursor
    control (``TERM=dumb``) at most one line per ``period`` seconds is written, the first one at once.
    """

    def __init__(
        self,
        stream: Optional[TextIO] = None,
        period: float = PERIOD,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stream, self.period, self.clock = stream or sys.stdout, period, clock
        self.is_live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._next = -math.inf
        self._open = False

    def update(self, text: str, always: bool = False) -> None:
        """Show ``text``; ``always``: write it to a log even within ``period``."""
        if self.is_live:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"{CLEAR}{text[:width]}", end="")
            self._open = True
        elif always or self.clock() >= self._next:
            self._next = self.clock() + self.period
            self._write(text)

    def keep(self, text: str) -> None:
        """Write ``text``, a line that stays; the next update is shown at once."""
        if self._open:
            self._write(CLEAR, end="")
        self._open = False
        self._write(text)
        self._next = -math.inf

    def _write(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.stream, flush=True)


class Remaining:
    """Estimates the time left for work of ``total`` units that take about equally long."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total, self.clock = total, clock
        self.start = clock()

    def text(self, done: float) -> str:
        """The time left after ``done`` units, the fraction of the current one included."""
        if done <= 0:
            return "time left not known yet"
        seconds = (self.clock() - self.start) / done * (self.total - done)
        return f"{timedelta(seconds=round(max(0, seconds)))} left"
