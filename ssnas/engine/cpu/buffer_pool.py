"""Memory for the large results of a step on a CPU, kept for the next step.

The C library returns what a program frees to the system, which clears every page that it hands out
again. A training step frees all that it has computed, and would wait for the clearing of the same
memory in every step, longer than for some of its kernels.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle

import torch
from torch import Tensor

SMALLEST = 1 << 16
"""Bytes of the smallest tensors that are worth it."""

WASTE = 4
"""How many times as large as a tensor its memory may be."""

LINE = 64
"""Bytes of a cache's line."""

SLACK = 1.25
"""How many times as much memory is kept, in whole blocks, as was ever in use."""


class Memory:
    """Tensors whose memory is used again as soon as nothing refers to them any more.

    A tensor lies in a block of memory of its own, the smallest that is idle and large enough. A new
    one is made where there is none, for which others that are idle may have to go.

    Attributes:
        peak: bytes that were in use at most.
        kept: bytes in use or idle.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []  # by size
        self._leases: dict[int, tuple[weakref.ref, mmap.mmap]] = {}
        # Tensors may go in the middle of anything, the search of a block included.
        self._returned: deque[mmap.mmap] = deque()
        self._used = self.peak = self.kept = 0
        # If all began at the same place in a page, a cache could hold few of them at a time.
        self._starts = cycle(range(0, mmap.PAGESIZE, LINE))

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `torch.empty` gives for this size, (N, C, H, W), in the channels-last layout."""
        count = math.prod(size) * dtype.itemsize
        if count < SMALLEST:
            return torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
        start = next(self._starts)
        block = self._take(count + mmap.PAGESIZE)
        view = memoryview(block)[start : start + count]
        lease = weakref.ref(view, self._give_back)
        self._leases[id(lease)] = lease, block
        # The tensor's memory keeps the view, wherever else it is used.
        return torch.frombuffer(view, dtype=dtype).resize_(size, memory_format=torch.channels_last)

    def _give_back(self, lease: weakref.ref) -> None:
        self._returned.append(self._leases.pop(id(lease))[1])

    def _take(self, count: int) -> mmap.mmap:
        with self._lock:
            while self._returned:
                block = self._returned.popleft()
                self._used -= len(block)
                insort(self._idle, block, key=len)
            place = bisect_left(self._idle, count, key=len)
            if place < len(self._idle) and len(self._idle[place]) <= WASTE * count:
                block = self._idle.pop(place)
            else:
                block = self._new(count)
            self._used += len(block)
            self.peak = max(self.peak, self._used)
            return block

    def _new(self, count: int) -> mmap.mmap:
        while self._idle and self.kept + count > SLACK * max(self.peak, self._used + count):
            self.kept -= len(self._idle.pop())
        block = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Fewer and larger pages, where there are any: the processor looks up fewer addresses.
        with suppress(AttributeError, OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
        self.kept += count
        return block
