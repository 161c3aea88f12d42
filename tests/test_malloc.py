"""Freed memory is used again: seen by the pages that the kernel has to clear."""

import resource
import subprocess
import sys

import pytest

from sharedkd import malloc

PAGES = """
import resource, sys
import torch
from sharedkd.malloc import keep_freed_memory
assert keep_freed_memory(False)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for mb in (200, 200, 150, 48, 200):
    if mb == 150: start = faults()
    torch.empty(mb << 18).fill_(1.0)
print(faults() - start)
"""


@pytest.mark.skipif(not malloc.keep_freed_memory(False), reason="another C library than glibc")
def test_pages_are_cleared_once():
    cleared = {}
    for how in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cleared[how] = int(done.stdout)
    assert cleared["return"] > 398 * 2**20 / resource.getpagesize()
    assert cleared["keep"] < cleared["return"] / 20


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)
    assert malloc.keep_freed_memory() is False
