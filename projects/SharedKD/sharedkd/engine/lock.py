"""One run at a time in an output folder.

The lock is ``flock``'s on a file in the folder: it ends with the process that holds it, however that
ends, so there are no stale ones.  Over NFS it holds between machines from NFSv4 on, and with older
versions only where the mount says so (not with ``nolock`` or ``local_lock=flock``).
"""

import errno
import fcntl
import logging
import os
import socket
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Dict, Iterator, Optional, Union

from sharedkd.errors import ConfigError

__all__ = ["BusyError", "check_free", "for_child", "locked"]

logger = logging.getLogger("detectron2.sharedkd")

INHERITED = "SHAREDKD_LOCK"  # the environment variable that names a descriptor held by the parent
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: Dict[int, IO[str]] = {}


class BusyError(ConfigError):
    """A run that another process is training already.

    ``key``, ``value``, ``problem`` and ``fix`` are those of :class:`~sharedkd.errors.ConfigError`.
    """


def _forget() -> None:
    """A data loader's worker outlives a killed run by seconds, and must not keep its lock."""
    if not _held:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in _held:
        os.dup2(null, descriptor)
    os.close(null)


@cache
def _forget_after_fork() -> None:
    """From the first lock on: an import changes nothing."""
    os.register_at_fork(after_in_child=_forget)


def check_free(folder: Union[str, Path]) -> None:
    """Writes nothing.

    Raises:
        BusyError: another process holds ``folder``, and has not handed it on (:func:`for_child`).
    """
    path = Path(folder) / "lock"
    if not path.exists() or _inherited(path) is not None:
        return
    with open(path) as file:
        _take(file, path)


@contextmanager
def locked(folder: Union[str, Path]) -> Iterator[IO[str]]:
    """Hold ``folder``, which is made if there is none.

    Yields:
        the lock's file; :func:`for_child` hands it on.

    Raises:
        BusyError: another process holds it.
    """
    _forget_after_fork()
    path = Path(folder) / "lock"
    descriptor = _inherited(path)
    if descriptor is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # not "w", which would empty the holder's
    else:
        os.environ.pop(INHERITED)  # a child's child has no part in it
        file = os.fdopen(descriptor, "a+")
    with file:
        _take(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held[file.fileno()] = file
        try:
            yield file
        finally:
            del _held[file.fileno()]


def for_child(file: IO[str]) -> Dict[str, str]:
    """The environment in which a child that gets the descriptor of ``file`` holds the lock, too."""
    return {**os.environ, INHERITED: str(file.fileno())}


def _inherited(path: Path) -> Optional[int]:
    """The descriptor of this very lock that the parent handed on; None if there is none."""
    try:
        descriptor = int(os.environ[INHERITED])
        return descriptor if os.path.samestat(os.fstat(descriptor), os.stat(path)) else None
    except (KeyError, ValueError, OSError):
        return None


def _take(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text().strip() or "another process"
        raise BusyError(
            "train.output_dir",
            path.parent,
            f"{holder} trains in this folder",
            "wait for it, or choose another folder",
        ) from None
    except OSError as e:
        if e.errno not in _UNSUPPORTED:
            raise
        logger.warning(f"{path.parent} cannot be locked: keep other runs out of it ({e.strerror})")
