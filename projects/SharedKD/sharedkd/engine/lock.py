"""One run at a time in an output folder.

The lock is a POSIX record lock on a file there.  The system releases it when its process ends, however
that ends, and a forked child never has it.  ``flock``, which the filelock library takes, belongs to an
open file instead: a data loader's worker inherits that, and would hold the folder of a killed run until
it notices; to prevent it, a hook has to run at every fork.

A process releases its lock as soon as it closes the file once, wherever it opened it: the holder reads
and checks it no more.
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
    """A run that another process is training already.

    ``key``, ``value``, ``problem`` and ``fix`` are those of :class:`~sharedkd.errors.ConfigError`.
    """


def check_free(folder: Union[str, Path]) -> None:
    """Writes nothing.

    Raises:
        BusyError: another process holds ``folder``.
    """
    path = Path(folder) / LOCK
    if path.exists():
        with open(path) as file:
            _take(file, fcntl.LOCK_SH)  # several may check at once


@contextmanager
def locked(folder: Union[str, Path], name: str = LOCK) -> Iterator[None]:
    """Hold ``folder``, which is made if there is none.

    Args:
        folder: of a run.
        name: of the lock's file; who does not train in the folder, but writes there, has one of its own.

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
        raise BusyError(
            "train.output_dir",
            folder,
            f"{file.read().strip() or 'another process'} trains in this folder",
            "wait for it, or choose another folder",
        ) from None
