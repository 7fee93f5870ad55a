"""Kernel calls that are put together once, and then run by one call in every step.

A step calls more than a hundred kernels, most of which take a fraction of a millisecond. Finding
their arguments takes Python as long as some of them take, so that is done once: a program knows for
every argument in which tensor of the step it lies, and where.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssnas.engine.cpu import library as kernels

WORDS = 0
"""The tensor, so to say, that holds the arguments themselves."""

WORD = 8
"""Bytes of an argument."""


@dataclass(frozen=True)
class Place:
    """Where a run finds or leaves values.

    Args:
        tensor: which one of a run's, counted from 1; or `WORDS`.
        start: of the first value, among those of the tensor.
        shape: (N, C, H, W), in the channels-last layout, or any other; dense but for `blocks`.
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

    def part(self, first: int, count: int) -> Place:
        """So many of the values."""
        return Place(self.tensor, self.start + first, (count,))

    def parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Place]:
        """The values, one part after the other."""
        starts, start = [], self.start
        for shape in shapes:
            starts.append(start)
            start += math.prod(shape)
        return [Place(self.tensor, *own) for own in zip(starts, shapes, strict=True)]

    def blocks(self, count: int) -> list[Place]:
        """Its channels in so many blocks, whose pixels remain as far apart as they are."""
        n, channels, *size = self.shape
        own = channels // count
        starts = range(self.start, self.start + channels, own)
        return [Place(self.tensor, start, (n, own, *size)) for start in starts]


Argument = int | float | Place | None


@dataclass(frozen=True)
class Call:
    """Of a kernel.

    Args:
        kernel: its name, see `Program.call`.
        arguments: see there.
        start: where they begin among all words.
    """

    kernel: str
    arguments: Sequence[Argument | Sequence]
    start: int


class Program:
    """Calls of `kernels`, one after the other, on the tensors of a run.

    Args:
        dtype: of the tensors.
        after: a program whose tensors are the first ones of a run of this one, so that its places
            are places here as well.

    Attributes:
        size: values of the memory that the calls need for what is no tensor of its own.
        tensors: how many a run takes.
        calls: those to be made.
    """

    def __init__(self, dtype: torch.dtype, after: Program | None = None) -> None:
        self.dtype, self.size = dtype, 0
        self.tensors = 0 if after is None else after.tensors
        self._memory = self.tensor(())
        self._idle: list[tuple[int, int]] = []  # from, to; by address
        self._words: list[int] = []
        self._addresses: list[tuple[int, int]] = []
        self.calls: list[Call] = []
        self._run: Callable[[Sequence[Tensor | None], list[float] | None], None] | None = None

    def tensor(self, shape: Sequence[int]) -> Place:
        """The next tensor of a run."""
        self.tensors += 1
        return Place(self.tensors, 0, tuple(shape))

    def empty(self, *shape: int) -> Place:
        """Values in the program's memory, until they are given back."""
        needed = self._extent(math.prod(shape))
        for i, (start, end) in enumerate(self._idle):
            if end - start >= needed:
                self._idle[i] = start + needed, end
                return Place(self._memory.tensor, start, shape)
        start = self.size
        if self._idle and self._idle[-1][1] == self.size:
            start, _ = self._idle.pop()
        self.size = start + needed
        return Place(self._memory.tensor, start, shape)

    def free(self, *places: Place) -> None:
        """Give back what lies in the program's memory; further calls may write there."""
        own = [place for place in places if place.tensor == self._memory.tensor]
        ends = [(place.start, place.start + self._extent(place.count)) for place in own]
        idle: list[tuple[int, int]] = []
        for start, end in sorted([*self._idle, *ends]):
            if idle and idle[-1][1] == start:
                start, _ = idle.pop()
            idle.append((start, end))
        self._idle = idle

    def _extent(self, count: int) -> int:
        """Of so many values: whole lines of a cache and one more, since it could hold only few
        images at a time if all began at the same place in a page."""
        line = 64 // self.dtype.itemsize
        return (-(-count // line) + 1) * line

    def call(self, kernel: str, *arguments: Argument | Sequence) -> None:
        """Call a kernel.

        Args:
            kernel: its name in kernels.cpp, without the type.
            arguments: numbers, places, None for what it shall not read or write, and sequences of
                those: a structure or an array, see `place`.
        """
        found = [self.place(own) if isinstance(own, Sequence) else own for own in arguments]
        self.calls.append(Call(kernel, arguments, self._enter(found)))
        self._run = None

    def place(self, values: Sequence) -> Place:
        """Where a structure or an array is to be found: its values one after the other, and in the
        place of a further sequence that one's."""
        return Place(WORDS, self._enter(_flat(values)), ())

    def _enter(self, values: Iterable[Argument]) -> int:
        first = len(self._words)
        for value in values:
            if isinstance(value, Place):
                self._addresses.append((len(self._words), value.tensor))
                size = WORD if value.tensor == WORDS else self.dtype.itemsize
                self._words.append(value.start * size)
            elif isinstance(value, float):
                self._words.append(*struct.unpack("q", struct.pack("d", value)))
            else:
                self._words.append(int(value or 0))
        return first

    def run(self, *tensors: Tensor | None, seconds: list[float] | None = None) -> None:
        """Make the calls.

        Args:
            tensors: dense, on the CPU: those of the program before this one, `size` values of
                memory, and the others, None for those that no call needs.
            seconds: to be extended by how long each call takes.

        Raises:
            ValueError: for another number of tensors.
        """
        if len(tensors) != self.tensors:
            raise ValueError(f"a run takes {self.tensors} tensors; found {len(tensors)}")
        if self._run is None:
            calls = [(call.kernel, call.start) for call in self.calls]
            self._run = kernels.bind(self.dtype, self._words, self._addresses, calls)
        self._run(tensors, seconds)


def _flat(values: Sequence) -> Iterator[Argument]:
    for value in values:
        if isinstance(value, Sequence):
            yield from _flat(value)
        else:
            yield value
