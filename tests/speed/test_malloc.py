"""Freed memory is used again: seen by the pages that the kernel has to clear."""

import platform
import resource
import subprocess
import sys

import pytest

from sharedkd.speed import malloc

PAGES = """
import resource, sys
import torch
from sharedkd.speed.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start = faults()
for _ in range(20):
    torch.empty(100 << 18).fill_(1.0)
print(faults() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_pages_are_cleared_once():
    cleared = {}
    for how in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cleared[how] = int(done.stdout)
    assert cleared["return"] >= 20 * 100 * 2**20 / resource.getpagesize()
    assert cleared["keep"] < cleared["return"] / 4  # the first, and where a hole was just too small


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)
    assert malloc.keep_freed_memory() is False
