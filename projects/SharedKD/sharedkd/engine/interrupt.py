"""SIGTERM and Ctrl-C: the step is finished and saved, then the program exits with 128 + the signal."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Callable, Iterator, List, Optional

import torch
import torch.distributed as dist
from detectron2.utils import comm

__all__ = [
    "Interrupted",
    "StopRequest",
    "Stopped",
    "command_line",
    "forward_signals",
    "interruptible",
    "resume_command",
]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C reaches every process of a terminal, and a parent may pass it on: both are one request.
SAME_REQUEST = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """Raised by a signal that ends the program while there is nothing to save."""


class Stopped(SystemExit):
    """Raised when a signal has ended training and a checkpoint is saved; its code is 128 + the signal."""


class _Once:
    """Handles the first signal, ignores its repetitions, and lets a later one end the process at once."""

    def __init__(self, first: Callable[[int], None]):
        self.signal: Optional[int] = None
        self._first = first

    def __call__(self, number: int, frame: Optional[FrameType]) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self._first(number)
        elif time.monotonic() - self._since > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def _handling(handler: Callable[[int, Optional[FrameType]], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest(ExitStack):
    """A context that records a request to stop, for a trainer that asks between its steps."""

    _current: Optional["StopRequest"] = None

    def __enter__(self) -> "StopRequest":
        _shield_workers()
        self._handler = _Once(_announce)
        self.enter_context(_handling(self._handler))
        self.callback(setattr, StopRequest, "_current", None)
        StopRequest._current = self
        return self

    @property
    def signal(self) -> Optional[int]:
        """The signal that asked this process to stop, if one did."""
        return self._handler.signal

    def agreed(self, device: torch.device) -> Optional[int]:
        """The signal that any process received; all call this together, with their backend's device."""
        own = self.signal or 0
        if comm.get_world_size() == 1:
            return own or None
        largest = torch.full((), own, device=device, dtype=torch.int32)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest) or None


def _announce(number: int) -> None:
    if comm.is_main_process():  # not by print, which the signal may have interrupted
        name = signal.Signals(number).name
        when = "after this step" if comm.get_world_size() == 1 else "soon, all processes together"
        text = f"\n{name}: stops {when}; a second one stops at once\n"
        os.write(sys.__stderr__.fileno(), text.encode())


def _shield_worker() -> None:
    """Make a data loader's worker ignore signals to the process group; its parent ends it.

    A terminal or scheduler that signals the group wants the training to stop, and the training needs its
    workers to finish the step.
    """
    if StopRequest._current is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


@cache
def _shield_workers() -> None:
    """Shield all workers forked from now on; called by the first training, not by an import."""
    os.register_at_fork(after_in_child=_shield_worker)


def command_line() -> List[str]:
    """The command line of this program, one string per argument."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [sys.executable, *sys.argv]
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        command = []
    return command if sys.argv[0] in command else ["torchrun", *sys.argv]


def resume_command() -> str:
    """The command that resumes this run: the command line of this program with --resume."""
    started = command_line()
    if "--resume" not in started:
        script = started.index(sys.argv[0])
        started.insert(script + 1, "--resume")
    return shlex.join(started)


@contextmanager
def forward_signals() -> Iterator[None]:
    """A context that passes signals on to the processes started with multiprocessing."""

    def forward(number: int, frame: Optional[FrameType]) -> None:
        for child in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)

    with _handling(forward):
        yield


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """The outermost context of a program: a signal ends it with one line, which ends in ``advice``."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with _handling(_Once(interrupt)):
        try:
            yield
        except KeyboardInterrupt as e:
            print(f"\ninterrupted; {advice}", file=sys.stderr, flush=True)
            number = e.args[0] if isinstance(e, Interrupted) else signal.SIGINT
            sys.exit(128 + number)
