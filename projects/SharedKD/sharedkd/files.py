"""Files that appear under their name complete or not at all."""

import glob
import os
from contextlib import contextmanager, suppress
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
        with _disk_errors():
            with open(unfinished, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            if verify is not None:
                verify(unfinished)
            os.replace(unfinished, path)
            _flush_folder(os.path.dirname(path))
    except Exception:
        with suppress(OSError):
            os.remove(unfinished)
        raise


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A context that raises the OSError behind another error: PyTorch hides a full disk behind its own.

    Raises:
        OSError: the cause of an error inside the block.
    """
    try:
        yield
    except Exception as error:
        cause: Optional[BaseException] = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise


def _flush_folder(folder: str) -> None:
    """Flush a folder, so that a new name is on the disk; not every file system supports this."""
    with suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str, names: str) -> List[str]:
    """Remove the temporary files that a killed process left in a folder.

    Args:
        folder: where :func:`replace` wrote.
        names: pattern of the names that the files would have got.

    Returns:
        the paths that are removed.
    """
    left = glob.glob(os.path.join(glob.escape(str(folder)), names + UNFINISHED))
    for path in left:
        os.remove(path)
    return left
