"""Freed memory stays with the process, in a fresh one whose allocator nothing else has changed."""

import platform
import subprocess
import sys

import pytest

from ssnas.runtime import allocator

SIZE = 64 << 20
"""Bytes, more than glibc ever keeps by itself: 16,384 pages, or 32 huge ones."""

SCRIPT = """
import ctypes, resource, sys
from ssnas.runtime.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
size = int(sys.argv[2])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def fill():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    """Count the pages that the system hands out, cleared, for five blocks one after the other."""
    command = [sys.executable, "-c", SCRIPT, mode, str(SIZE)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_serves_the_next_block():
    assert faults("default") >= 5 * 32
    assert faults("kept") < 5


class NoFunctions:
    """A C library of another kind."""


def no_library(_name):
    raise OSError("there is none")


@pytest.mark.parametrize("load", [lambda _name: NoFunctions(), no_library])
def test_other_c_libraries_stay_as_they_are(load, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert allocator.keep_freed_memory() is False
