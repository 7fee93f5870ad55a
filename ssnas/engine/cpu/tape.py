"""A tape of kernel calls, put together once and then run by one call in every step.

A step calls more than a hundred kernels, most of which take a fraction of a millisecond. Python
takes as long to collect their arguments as some of them take to run, so it does so once: the tape
records for every argument which tensor of the step holds it, and at which position.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssnas.engine.cpu import library

WORDS = 0
"""The number that stands for the tape's own arguments among the tensors of a run."""

WORD = 8
"""Bytes of one argument."""


@dataclass(frozen=True)
class Region:
    """Values within a tensor of a run, which a kernel reads or writes.

    Args:
        tensor: the number of the run's tensor, from 1, or `WORDS`.
        start: position of the first value in that tensor.
        shape: (N, C, H, W) in the channels-last layout, or any other; dense but for `blocks`.

    Example:
        >>> x = Region(tensor=3, start=100, shape=(2, 6, 5, 4))
        >>> x.count, x.channels, x.pixels
        (240, 6, 40)
        >>> x.part(7, 2)
        Region(tensor=3, start=107, shape=(2,))
    """

    tensor: int
    start: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def pixels(self) -> int:
        return self.count // self.channels

    def part(self, first: int, count: int) -> Region:
        """`count` of the values, from `first` on."""
        return Region(self.tensor, self.start + first, (count,))

    def parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Region]:
        """Regions of these shapes, one after the other."""
        regions, start = [], self.start
        for shape in shapes:
            regions.append(Region(self.tensor, start, shape))
            start += math.prod(shape)
        return regions

    def blocks(self, count: int) -> list[Region]:
        """Split the channels into `count` blocks; the pixels of each stay as far apart as here."""
        n, channels, *size = self.shape
        width = channels // count
        starts = range(self.start, self.start + channels, width)
        return [Region(self.tensor, start, (n, width, *size)) for start in starts]


Argument = int | float | Region | None
Arguments = Sequence[Any]
"""Arguments, and sequences of them for structures and arrays, to any depth."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Args:
        kernel: the kernel's name, see `Tape.call`.
        arguments: see there.
        start: position of the first argument among all words.
    """

    kernel: str
    arguments: Arguments
    start: int


class Tape:
    """Calls of compiled kernels, one after the other, on the tensors of a run.

    Args:
        dtype: the type of the tensors.
        after: another tape, whose tensors come first in a run of this one, so that its regions
            are regions here as well.

    Attributes:
        size: how many values of scratch memory a run needs.
        tensors: how many tensors a run takes.
        calls: the calls.
        observer: where set, every run is timed call by call, and the seconds are shown to it.
    """

    observer: ClassVar[Callable[[Tape, list[float]], None] | None] = None

    def __init__(self, dtype: torch.dtype, after: Tape | None = None) -> None:
        self.dtype, self.size = dtype, 0
        self.tensors: int = 0 if after is None else after.tensors
        self._memory = self.tensor(())
        self._idle: list[tuple[int, int]] = []  # free scratch memory: (start, end), by address
        self._words: list[int] = []
        self._addresses: list[tuple[int, int]] = []
        self.calls: list[Call] = []
        self._run: Callable[[Sequence[Tensor | None], list[float] | None], None] | None = None

    def tensor(self, shape: Sequence[int]) -> Region:
        """Declare the next tensor of a run."""
        self.tensors += 1
        return Region(self.tensors, 0, tuple(shape))

    def empty(self, *shape: int) -> Region:
        """Take scratch memory, until it is freed."""
        needed = self._extent(math.prod(shape))
        for i, (start, end) in enumerate(self._idle):
            if end - start >= needed:
                self._idle[i] = start + needed, end
                return Region(self._memory.tensor, start, shape)
        start = self.size
        if self._idle and self._idle[-1][1] == self.size:
            start, _ = self._idle.pop()
        self.size = start + needed
        return Region(self._memory.tensor, start, shape)

    def free(self, *regions: Region) -> None:
        """Give scratch memory back; later calls may overwrite it. Other regions are left alone."""
        scratch = [region for region in regions if region.tensor == self._memory.tensor]
        ends = [(region.start, region.start + self._extent(region.count)) for region in scratch]
        idle: list[tuple[int, int]] = []
        for start, end in sorted([*self._idle, *ends]):
            if idle and idle[-1][1] == start:
                start, _ = idle.pop()
            idle.append((start, end))
        self._idle = idle

    def _extent(self, count: int) -> int:
        """Round `count` values up to whole cache lines, and add one.

        If all regions began at the same position in a page, a cache could hold few at a time.
        """
        line = 64 // self.dtype.itemsize
        return (-(-count // line) + 1) * line

    def call(self, kernel: str, *arguments: Argument | Arguments) -> None:
        """Append a call.

        Args:
            kernel: its name in kernels.cpp, without the type.
            arguments: numbers, regions, None for what it shall not read or write, and sequences of
                those for a structure or an array, see `structure`.
        """
        words = [
            self.structure(argument) if isinstance(argument, Sequence) else argument
            for argument in arguments
        ]
        self.calls.append(Call(kernel, arguments, self._enter(words)))
        self._run = None

    def structure(self, values: Arguments) -> Region:
        """Lay out a C structure or array among the tape's words; nested sequences lie in it."""
        return Region(WORDS, self._enter(_flat(values)), ())

    def _enter(self, values: Iterable[Argument]) -> int:
        first = len(self._words)
        for value in values:
            if isinstance(value, Region):
                self._addresses.append((len(self._words), value.tensor))
                size = WORD if value.tensor == WORDS else self.dtype.itemsize
                self._words.append(value.start * size)
            elif isinstance(value, float):
                self._words.append(*struct.unpack("q", struct.pack("d", value)))
            else:
                self._words.append(int(value or 0))
        return first

    def run(self, *tensors: Tensor | None) -> None:
        """Make the calls.

        Args:
            tensors: dense, on the CPU: those of the tape before this one, `size` values of
                scratch memory, and the declared ones; None for a tensor that no call needs.

        Raises:
            ValueError: for another number of tensors.
        """
        if len(tensors) != self.tensors:
            raise ValueError(f"a run takes {self.tensors} tensors; found {len(tensors)}")
        if self._run is None:
            calls = [(call.kernel, call.start) for call in self.calls]
            self._run = library.bind(self.dtype, self._words, self._addresses, calls)
        if self.observer is None:
            self._run(tensors, None)
        else:
            seconds: list[float] = []
            self._run(tensors, seconds)
            self.observer(seconds)


def _flat(values: Arguments) -> Iterator[Argument]:
    for value in values:
        if isinstance(value, Sequence):
            yield from _flat(value)
        else:
            yield value
