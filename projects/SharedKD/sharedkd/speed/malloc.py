"""What the C library does with memory that is freed."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt, in its malloc.h, and what makes it keep every page.
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NO_BLOCK = -4, 0


def keep_freed_memory() -> bool:
    """Let this process use the pages of freed tensors again, from now on, instead of returning them.

    A training step on a CPU frees and takes the same maps every time.  As a rule glibc gives large
    blocks back to the operating system, which has to clear every page before it is written again.

    Returns:
        whether this C library can be told; other ones than glibc do as they do.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_MAX, _NO_BLOCK))
