"""Freed memory stays with the process, in a fresh one whose allocator nothing else has changed."""

import platform
import subprocess
import sys

import pytest

from ssnas.runtime import allocator

SCRIPT = """
import resource, sys
import torch
from ssnas.runtime.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def fill():
    torch.empty(64, 2**18).fill_(1.0)  # 64 MiB: 16,384 pages

# The first ones settle where in the heap such a tensor goes.
for _ in range(20):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    """Pages that the system handed out, cleared, for ten tensors of 64 MiB one after the other."""
    command = [sys.executable, "-c", SCRIPT, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_serves_the_next_tensor():
    # With huge pages the system hands out 32 for 64 MiB instead of 16,384.
    assert faults("default") >= 10 * 32
    assert faults("kept") < 10


class NoFunctions:
    """A C library of another kind."""


def no_library(_name):
    raise OSError("there is none")


@pytest.mark.parametrize("load", [lambda _name: NoFunctions(), no_library])
def test_other_c_libraries_stay_as_they_are(load, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert allocator.keep_freed_memory() is False
