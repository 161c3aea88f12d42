"""Files that appear under their name complete or not at all."""

import os
from typing import IO, Any, Callable

__all__ = ["replace"]


def replace(path: str, write: Callable[[IO[bytes]], Any], writer: str = "") -> None:
    """Let ``write`` fill a file under a temporary name, flush it to the disk, then rename it.

    Args:
        path: the file.
        write: takes the open binary file.
        writer: keeps apart processes that may write the same file at the same time.
    """
    unfinished = f"{path}{writer}.tmp"
    with open(unfinished, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)
