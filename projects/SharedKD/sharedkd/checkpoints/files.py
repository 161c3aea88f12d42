"""Files that appear under their name complete or not at all."""

import glob
import os
from contextlib import suppress
from typing import IO, Any, Callable, Iterator, List, Optional

__all__ = ["remove_unfinished", "replace"]

UNFINISHED = ".tmp"


def replace(
    path: str,
    write: Callable[[IO[bytes]], Any],
    writer: str = "",
    verify: Optional[Callable[[str], Any]] = None,
) -> None:
    """Let ``write`` fill a file under a temporary name, flush it to the disk, then rename it.

    Args:
        path: the file.
        write: takes the open binary file.
        writer: keeps apart processes that may write the same file at the same time.
        verify: takes the temporary file's name, and raises if what it reads there is not complete.

    Raises:
        OSError: the disk is full, the folder read-only and the like; whatever was under ``path``
            before is still there.
    """
    unfinished = f"{path}{writer}{UNFINISHED}"
    try:
        with open(unfinished, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if verify is not None:
            verify(unfinished)
        os.replace(unfinished, path)
        _flush_folder(os.path.dirname(path))
    except Exception as error:
        with suppress(OSError):
            os.remove(unfinished)
        for cause in _causes(error):
            if isinstance(cause, OSError):
                raise cause
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: PyTorch hides a full disk behind an error of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flush_folder(folder: str) -> None:
    """A name is on the disk once its folder is; not every file system can be asked for that."""
    with suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str, names: str) -> List[str]:
    """Remove what a killed process left of the files that match ``names``; returns what it was."""
    left = glob.glob(os.path.join(glob.escape(str(folder)), names + UNFINISHED))
    for path in left:
        os.remove(path)
    return left
