"""The two passes over a graph as tapes of kernel calls: what every group of operations shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ssnas.engine.cpu.tape import Region, Tape


class LearnedTensors:
    """The tensors besides the states that gradients flow to: kernels, and affine parameters."""

    def __init__(self) -> None:
        self._fetchers: list[Callable[[], Sequence[Tensor]]] = []
        self._count = 0

    def add(self, count: int, fetch: Callable[[], Sequence[Tensor]]) -> slice:
        """Add `count` tensors that `fetch` returns; returns their positions among all."""
        self._fetchers.append(fetch)
        self._count += count
        return slice(self._count - count, self._count)

    def tensors(self) -> list[Tensor]:
        """All of them, as they are now."""
        return [tensor for fetch in self._fetchers for tensor in fetch()]


class ForwardPass:
    """The tape that computes the sums, as the groups of operations see it.

    Args:
        dtype: the type of the tensors.
        shapes: the shapes of inputs, weights w_o, summands and learned tensors, None for those
            that are absent.
        counts: how many of those are inputs and summands.
        norms: all batch norms.
        keeps: whether a backward pass may follow.

    Attributes:
        states: the regions of all states, None for those without a value.
        scale: the region of the weights w_o, or None.
        tensors: the regions of the learned tensors.
        statistics: running mean, running variance and number of batches of each norm.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shapes: Sequence[tuple[int, ...] | None],
        counts: tuple[int, int],
        norms: Sequence[nn.BatchNorm2d],
        keeps: bool,
    ) -> None:
        self.tape, self.keeps = Tape(dtype), keeps
        inputs, sums = counts
        declared = [self.tape.tensor(shape or ()) for shape in shapes]
        regions = [
            None if shape is None else region
            for region, shape in zip(declared, shapes, strict=True)
        ]
        self.scale = regions[inputs]
        self.states: list[Region | None] = regions[:inputs] + regions[inputs + 1 :][:sums]
        self.tensors: list[Region] = declared[inputs + 1 + sums :]
        self.statistics = {norm: tuple(self.tape.tensor(()) for _ in range(3)) for norm in norms}

    def state(self, index: int) -> Region:
        """The region of a state that has a value."""
        region = self.states[index]
        assert region is not None
        return region

    def drop(self, *regions: Region) -> None:
        """Free what only a backward pass reads any more, if none follows."""
        if not self.keeps:
            self.tape.free(*regions)


class BackwardPass:
    """The tape that computes the gradients, as the groups of operations see it.

    Args:
        forward: the pass whose tensors and scratch memory this one reads.
        of_states: for each state whether its gradient is asked for.
        of_tensors: for each learned tensor likewise.

    Attributes:
        wanted: for each state whether its gradient is needed, for itself or for what it comes from.
        gradients: the regions of the states' gradients, None where there is nothing yet.
        regions: the gradients for the weights w_o and the learned tensors, in one tensor.
        returned: the gradients for states, which are tensors of their own.
    """

    def __init__(
        self, forward: ForwardPass, of_states: Sequence[bool], of_tensors: Sequence[bool]
    ) -> None:
        self.states, self.tensors = forward.states, forward.tensors
        self.tape = Tape(forward.tape.dtype, after=forward.tape)
        self.regions: list[Region] = []
        self.returned: list[Region] = []
        self.wanted = list(of_states)
        self.gradients: list[Region | None] = [None] * len(self.states)
        self._joint = self.tape.tensor(())
        self._asked_states, self._asked_tensors = list(of_states), list(of_tensors)
        self._of_tensors: dict[int, Region] = {}

    def state(self, index: int) -> Region:
        """The region of a state that has a value."""
        region = self.states[index]
        assert region is not None
        return region

    def needs(self, *positions: slice | None) -> bool:
        """Tell whether a gradient for one of the learned tensors at these positions is needed."""
        return any(any(self._asked_tensors[where]) for where in positions if where is not None)

    def of_tensors(self, where: slice) -> list[Region]:
        """The regions for the gradients of learned tensors."""
        return [self._of_tensor(i) for i in range(where.start, where.stop)]

    def _of_tensor(self, i: int) -> Region:
        shape = self.tensors[i].shape
        if not self._asked_tensors[i]:
            return self.tape.empty(*shape)
        if i not in self._of_tensors:
            self._of_tensors[i] = self.joint(shape)
        return self._of_tensors[i]

    def joint(self, shape: tuple[int, ...]) -> Region:
        """A further region of the tensor that holds all gradients but those for states."""
        start = sum(region.count for region in self.regions)
        self.regions.append(Region(self._joint.tensor, start, shape))
        return self.regions[-1]

    def of_state(self, state: int, whole: bool = True) -> tuple[Region | None, bool]:
        """The region for the gradient of a state, None if it is not needed, and whether to add.

        Args:
            whole: whether the caller can write all of it, instead of adding to what there is.
        """
        if not self.wanted[state]:
            return None, False
        adds = not whole or self.gradients[state] is not None
        region = self.gradients[state]
        if region is None:
            region = self.gradients[state] = self.new_of_state(state)
            if not whole:
                self.tape.call("clear", region, region.count)
        return region, adds

    def new_of_state(self, state: int) -> Region:
        """Memory for the gradient of a state: a tensor of its own if it is asked for."""
        shape = self.state(state).shape
        if not self._asked_states[state]:
            return self.tape.empty(*shape)
        self.returned.append(self.tape.tensor(shape))
        return self.returned[-1]
