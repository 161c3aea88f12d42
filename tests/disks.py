"""Disks of their own for tests, and what can go wrong with them."""

import os
import subprocess
from contextlib import contextmanager, suppress


def mounted(folder, size):
    """Whether a disk of that size is there now: not everybody may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    return os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0


def unmount(folder):
    """Lazily: the log of a run stays open until its process ends."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder):
    with open(folder / "filler", "wb", buffering=0) as f, suppress(OSError):
        while True:
            f.write(bytes(4096))
    try:
        yield
    finally:
        (folder / "filler").unlink()


@contextmanager
def read_only(folder):
    """For whatever is opened from now on: open files would keep the disk itself from it."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    try:
        yield
    finally:
        unmount(folder)


FAULTS = {"full": (full, "No space left on device"), "read-only": (read_only, "Read-only file")}
