"""A small disk of its own for a test."""

import os
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def disk(folder, size):
    """A disk of that size, such as ``300m``; skips where the user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder, size):
    """Make a disk of :func:`disk` larger."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
