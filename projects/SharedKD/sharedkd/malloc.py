"""What the C library does with memory that is freed."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h: parameter, what it is as a rule, what keeps every page.
_TRIM_THRESHOLD = (-1, 64 << 20, -1)
_MMAP_THRESHOLD = (-3, 32 << 20, 32 << 20)
_MMAP_MAX = (-4, 1 << 16, 0)


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process use the pages of freed tensors again, instead of returning them.

    A training step on a CPU frees and takes the same maps every time. As a rule glibc gives large
    blocks back to the operating system, which has to clear every page before it is written again.

    Args:
        keep: False sets the limits that glibc comes to by itself in a process that frees large blocks.

    Returns:
        whether this C library can be told; other ones than glibc do as they do.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX)
    return all(libc.mallopt(name, (usual, kept)[keep]) for name, usual, kept in settings)
