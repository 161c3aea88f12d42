"""One run at a time in an output folder.

The lock is a POSIX record lock on a file there.  The system releases it when its process ends, however
that ends, and a forked child does not inherit it.  ``flock``, which the filelock library uses, belongs
to an open file instead.  A data loader's worker inherits open files, and would hold the folder of a
killed run until the worker ends; preventing this would take a hook at every fork.

A process loses a record lock as soon as it closes any of its handles to the file, so the holder must
not open the file again.
"""

import errno
import fcntl
import logging
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator, Union

from sharedkd.errors import ConfigError

__all__ = ["BusyError", "check_free", "locked"]

logger = logging.getLogger("detectron2.sharedkd")

LOCK = "lock"  # the name of its file


class BusyError(ConfigError):
    """Raised for a folder in which another process trains."""


def check_free(folder: Union[str, Path]) -> None:
    """Raise a BusyError if a process holds ``folder``, without writing to it."""
    path = Path(folder) / LOCK
    if path.exists():
        with open(path) as file:
            _take(file, fcntl.LOCK_SH)  # several may check at once


@contextmanager
def locked(folder: Union[str, Path], name: str = LOCK) -> Iterator[None]:
    """Hold ``folder``, which is created if it does not exist.

    Args:
        name: the lock's file; a process that writes there without training uses another name.

    Raises:
        BusyError: another process holds it.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:  # not "w", which would empty the holder's
        _take(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _take(file: IO[str], kind: int) -> None:
    folder = os.path.dirname(file.name)
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            logger.warning(f"{folder} cannot be locked: keep other runs out of it ({e.strerror})")
            return
        file.seek(0)
        problem = f"{file.read().strip() or 'another process'} trains in this folder"
        fix = "wait for it, or choose another folder"
        raise BusyError("train.output_dir", folder, problem, fix) from None
