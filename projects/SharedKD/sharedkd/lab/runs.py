"""Runs training commands as child processes: starts, follows and resumes them."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Optional, Sequence, Union

from omegaconf import DictConfig

from sharedkd.config import load_config
from sharedkd.engine.checkpoint import POINTER, has_run
from sharedkd.engine.hooks.record import read_record
from sharedkd.engine.lock import BusyError, check_free, locked
from sharedkd.engine.resume import changes
from sharedkd.errors import ConfigError
from sharedkd.lab.progress import LiveLine, Progress, progress_in

__all__ = ["BusyError", "Run", "short", "tool"]


@dataclass
class Run:
    """One training run of tools/lazyconfig_train_net.py."""

    config: Path
    overrides: Sequence[str]  #: of the config, its output folder too
    folder: Path  #: that output folder

    @cached_property
    def cfg(self) -> DictConfig:
        return load_config(str(self.config), self.overrides)

    @property
    def weights(self) -> Path:
        return self.folder / "model_final.pth"

    @property
    def log(self) -> Path:
        return self.folder / "console.txt"

    @property
    def started(self) -> bool:
        return has_run(self.folder)

    @property
    def finished(self) -> bool:
        """Whether it is trained and evaluated."""
        return "results" in self.record

    @property
    def record(self) -> Dict[str, Any]:
        """Its run.json, see :mod:`sharedkd.engine.hooks.record`."""
        return read_record(self.folder)

    def check(self, teacher: Optional["Run"] = None) -> None:
        """Refuse a folder with a run of other settings, or one that is older than its teacher's."""
        if self.started and changes(self.folder, self.cfg):
            problem = "holds a run with other settings"
        elif self.started and teacher and not self._is_younger(teacher):
            problem = f"holds a student of another teacher than {short(teacher.weights)}"
        else:
            return
        fix = "remove that folder, or name another with --output DIR"
        raise ConfigError("--output", short(self.folder), problem, fix)

    def _is_younger(self, teacher: "Run") -> bool:
        latest = self.folder / POINTER
        return teacher.finished and teacher.weights.stat().st_mtime < latest.stat().st_mtime

    def command(self, root: Path) -> Sequence[str]:
        """The command that starts or resumes it; ``root`` is the repository."""
        return [
            *tool("lazyconfig_train_net.py", root),
            "--config-file",
            short(self.config),
            *(["--resume"] if self.started else []),
            *self.overrides,
        ]

    def finish(self, root: Path) -> None:
        """:meth:`train` it if it is not finished, with its progress on the console."""
        if self.finished:
            print(f"      already finished: {short(self.weights)}")
            return
        print(f"      {shlex.join(self.command(root))}", flush=True)
        start, live = time.perf_counter(), LiveLine()
        iterations = self.cfg.train.max_iter
        self.train(root, iterations, lambda now: live.update(f"      {now}", now.is_last))
        live.keep(f"      trained and evaluated in {time.perf_counter() - start:.0f} s")

    def train(self, root: Path, iterations: int, say: Callable[[Progress], None]) -> None:
        """Start or resume the training command of so many iterations, and wait for it.

        ``say`` receives one line of progress at a time; the whole output goes to :attr:`log`.

        Raises:
            BusyError: another process trains it.
            ConfigError: it failed; the message has its last line of output.
        """
        last = deque(maxlen=20)
        # The command locks its folder, and may outlive this process.  This process has a lock of its own
        # there, for the time before and for the log.
        with locked(self.folder, "comparison.lock"), open(self.log, "a") as file:
            check_free(self.folder)
            command = self.command(root)
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                bufsize=1,
            ) as process:
                try:
                    for line in process.stdout:
                        _write(file, line)
                        last.append(line)
                        progress = progress_in(line, iterations)
                        if progress:
                            say(progress)
                except BaseException:
                    process.terminate()  # it saves what it has
                    for line in process.stdout:
                        _write(file, line)
                    raise
        if process.returncode:
            reason = next((x.strip() for x in reversed(last) if x.strip()), "")
            problem = f"is how this run ended: {reason}"
            fix = f"see {short(self.log)}; the command was: {shlex.join(command)}"
            raise ConfigError(short(self.folder), f"status {process.returncode}", problem, fix)


def _write(file: IO[str], line: str) -> None:
    with suppress(OSError):  # a full disk; the run itself reports it
        file.write(line)


def tool(name: str, root: Path = Path()) -> List[str]:
    """The command that starts ``name`` of tools/; ``root`` is the repository."""
    return [short(sys.executable), short(root / "tools" / name)]


def short(path: Union[str, Path]) -> str:
    """``path`` as seen from the current folder, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
