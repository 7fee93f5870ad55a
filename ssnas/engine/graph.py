"""Graphs of mixed operations, Σ_o w_o o(x), on the edges between states.

One operation at a time, a search step keeps thousands of intermediate tensors and waits for memory
far longer than it computes. Here operations of one kind on edges that leave one state are computed
side by side as one wide operation: on a CPU by compiled kernels (`engine.cpu`), everywhere else, or
without a C++ compiler, by PyTorch's functions (`torch_backend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssnas.engine.batch_norm import joined
from ssnas.engine.cpu import autograd, library
from ssnas.engine.cpu.tape import Tape
from ssnas.engine.op_group import OpGroup
from ssnas.engine.torch_backend import accumulate, add_groups
from ssnas.engine.torch_backend import concatenated as concatenated_densely
from ssnas.runtime.distributed import active


class Graph:
    """States x_j = before_j + Σ_{i<j} Σ_o w_o o(x_i), of which the first ones are inputs.

    Args:
        groups: the operations.
        inputs: how many states are.
        sums: how many are computed.

    Raises:
        ValueError: for a group that does not lead to a later state.
    """

    def __init__(self, groups: Sequence[OpGroup], inputs: int, sums: int) -> None:
        for group in groups:
            if min(group.targets) <= max(*group.sources, inputs - 1):
                raise ValueError(
                    f"a group from {group.sources} must lead on; found {group.targets}"
                )
        self.groups, self.inputs, self.sums = groups, inputs, sums
        self._plan: autograd.Plan | None = None
        self._steps: list[_Step] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy plans for its own operations."""
        return {**self.__dict__, "_plan": None, "_steps": None}

    def __call__(
        self,
        inputs: Sequence[Tensor],
        scale: Tensor | None = None,
        before: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:
        """Compute the sums.

        Args:
            inputs: the first states, (N, C, H, W).
            scale: the w_o of all weighted groups' targets, one after the other, or None for 1.
            before: what is added to each sum, (N, C', H', W'), or None for zeros; they may be
                changed in place.

        Returns:
            the sums, None where there is nothing to add.
        """
        before = [None] * self.sums if before is None else list(before)
        if not self.groups:
            return before
        if not _compiled(inputs[0]):
            return self._by_torch(inputs, scale, before)
        if any(group.described is None for group in self.groups):
            return self._by_states(inputs, scale, before)
        if self._plan is None:
            self._plan = autograd.Plan(self.groups, self.inputs, self.sums)
        return autograd.compute(self._plan, inputs, scale, before)

    def _scales(self, scale: Tensor | None) -> list[Tensor | None]:
        """The weights of each group; None where it has none."""
        counts = [len(group.targets) if group.weighted else 0 for group in self.groups]
        if scale is None:
            return [None] * len(counts)
        parts = zip(self.groups, scale.split(counts), strict=True)
        return [part if group.weighted else None for group, part in parts]

    def _by_torch(
        self, inputs: Sequence[Tensor], scale: Tensor | None, before: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        states = [*inputs, *before]
        leaving: dict[tuple[int, ...], list[tuple[OpGroup, Tensor | None]]] = {}
        for group, weights in zip(self.groups, self._scales(scale), strict=True):
            leaving.setdefault(group.sources, []).append((group, weights))
        for sources in sorted(leaving, key=max):
            add_groups(states, _read(states, sources), leaving[sources])
        return states[self.inputs :]

    def _by_states(
        self, inputs: Sequence[Tensor], scale: Tensor | None, before: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """State by state: known groups by the kernels, the others by their own `forward`."""
        if self._steps is None:
            sources = sorted({group.sources for group in self.groups}, key=max)
            self._steps = [_Step(self, source) for source in sources]
        scales = self._scales(scale)
        states = [*inputs, *before]
        for step in self._steps:
            step(states, scales)
        return states[self.inputs :]


class _Step:
    """The groups of a graph that leave the same states, one graph and the unknown ones."""

    def __init__(self, graph: Graph, sources: tuple[int, ...]) -> None:
        self.sources, self.first = sources, graph.inputs
        leaving = [i for i, group in enumerate(graph.groups) if group.sources == sources]
        self.known = [i for i in leaving if graph.groups[i].described is not None]
        self.unknown = [(i, graph.groups[i]) for i in leaving if i not in self.known]
        shift, here = len(sources) - graph.inputs, tuple(range(len(sources)))
        self.graph = Graph(
            [
                OpGroup(group.ops, tuple(t + shift for t in group.targets), here, group.weighted)
                for group in (graph.groups[i] for i in self.known)
            ],
            len(sources),
            graph.sums,
        )

    def __call__(self, states: list[Tensor | None], scales: Sequence[Tensor | None]) -> None:
        """Add the groups' outputs to the states that follow, in the list."""
        read = [state for state in (states[i] for i in self.sources) if state is not None]
        known = [scale for scale in (scales[i] for i in self.known) if scale is not None]
        states[self.first :] = self.graph(
            read, joined(known) if known else None, states[self.first :]
        )
        x = concatenated(read)
        for i, group in self.unknown:
            weights = scales[i]
            for position, (op, target) in enumerate(zip(group.ops, group.targets, strict=True)):
                value = op(x) if weights is None else weights[position] * op(x)
                total = states[target]
                states[target] = value if total is None else total + value


def _read(states: Sequence[Tensor | None], sources: Sequence[int]) -> Tensor:
    """The channels of several states, one after the other."""
    return concatenated([state for state in (states[i] for i in sources) if state is not None])


def concatenated(states: Sequence[Tensor]) -> Tensor:
    """Concatenate channels, in the way that suits who reads the gradients.

    Example:
        >>> concatenated([torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)]).shape
        torch.Size([1, 5, 4, 4])
    """
    if len(states) > 1 and _compiled(states[0]):
        return torch.cat(list(states), dim=1)
    return concatenated_densely(states)


def _compiled(x: Tensor) -> bool:
    """Tell whether the compiled kernels can take x.

    They know of the statistics of one process. A dispatch mode does not see them, unless somebody
    observes them for it.
    """
    unseen = torch._C._len_torch_dispatch_stack() > 0 and Tape.observer is None
    return library.usable(x) and not active() and not unseen


__all__ = ["Graph", "accumulate", "concatenated"]
