"""Mixed operations, Σ_o w_o o(x), on the edges between states: the search's hot path.

Computed one operation at a time, a search step keeps thousands of intermediate tensors, and waits
for memory far longer than it computes. Here operations of one kind on edges that leave one state
are computed side by side as one wide operation: on a CPU by kernels of the project's own (`fused`),
everywhere else, or without a C++ compiler, by PyTorch's functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ssnas.engine.batch_norm import Norm, batch_norm, joined, record_statistics
from ssnas.engine.cpu import autograd as fused
from ssnas.engine.cpu import library as kernels
from ssnas.engine.op_group import Term
from ssnas.networks.operations import ConvNorm, DepthwiseSeparable, FactorizedReduce
from ssnas.runtime.distributed import active


class Graph:
    """States x_j = before_j + Σ_{i<j} Σ_o w_o o(x_i), of which the first ones are given.

    Args:
        terms: the operations.
        given: how many states are.
        sums: how many are not.

    Raises:
        ValueError: for a term that does not lead to a later state.
    """

    def __init__(self, terms: Sequence[Term], given: int, sums: int) -> None:
        for term in terms:
            if min(term.targets) <= max(*term.sources, given - 1):
                raise ValueError(f"a term from {term.sources} must lead on; found {term.targets}")
        self.terms, self.given, self.sums = terms, given, sums
        self._plan: fused.Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy plans for its own operations."""
        return {**self.__dict__, "_plan": None}

    def __call__(
        self,
        given: Sequence[Tensor],
        scale: Tensor | None = None,
        before: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:
        """Compute the sums.

        Args:
            given: the first states, (N, C, H, W).
            scale: the w_o of all weighted terms' targets, one after the other, or None for 1.
            before: what is added to each sum, (N, C', H', W'), or None for zeros; they may be
                changed in place.

        Returns:
            the sums, None where there is nothing to add.
        """
        before = [None] * self.sums if before is None else list(before)
        if not self.terms:
            return before
        if not _usable(given[0]):
            return self._composed(given, scale, before)
        if self._plan is None:
            self._plan = fused.Plan(self.terms, self.given, self.sums)
        return fused.mix(self._plan, given, scale, before)

    def _composed(
        self, given: Sequence[Tensor], scale: Tensor | None, before: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        states = [*given, *before]
        counts = [len(term.targets) if term.weighted else 0 for term in self.terms]
        scales = [None] * len(counts) if scale is None else scale.split(counts)
        leaving: dict[tuple[int, ...], list[tuple[Term, Tensor | None]]] = {}
        for term, own in zip(self.terms, scales, strict=True):
            leaving.setdefault(term.sources, []).append((term, own if term.weighted else None))
        for sources in sorted(leaving, key=max):
            _add(states, concatenated([states[i] for i in sources]), leaving[sources])
        return states[self.given :]


def concatenated(states: Sequence[Tensor]) -> Tensor:
    """Their channels, one after the other."""
    if len(states) == 1:
        return states[0]
    return torch.cat(states, dim=1) if _usable(states[0]) else _Concatenate.apply(*states)


def _usable(x: Tensor) -> bool:
    """Whether the compiled kernels can take x; they know of the statistics of one process."""
    return kernels.usable(x) and not active()


# By PyTorch's functions


class Source:
    """What several operations read, and relu of it, computed once.

    Args:
        x: (N, C, H, W), which all of them read, or (N, E C, H, W), where each of E operations
            reads its own block of channels.
        blocks: 1, or E.
    """

    def __init__(self, x: Tensor, blocks: int = 1) -> None:
        self.x, self.blocks = x, blocks
        self._rectified: dict[int, Tensor] = {}

    def rectified(self, count: int = 1) -> Tensor:
        """relu(x), `count` times side by side if x has no blocks."""
        if not self._rectified:
            self._rectified[self.blocks] = self.x.relu()
        if count not in self._rectified:
            self._rectified[count] = torch.cat([self._rectified[1]] * count, dim=1)
        return self._rectified[count]


def _add(
    states: list[Tensor | None], x: Tensor, leaving: Sequence[tuple[Term, Tensor | None]]
) -> None:
    """Add the terms that read x, each with the w_o of its targets, to those."""
    source = Source(x)
    totals: dict[tuple[int, ...], Tensor] = {}
    for term, scale in leaving:
        value = _normalised(term, source, scale)
        total = totals.get(term.targets)
        totals[term.targets] = value if total is None else total + value
    for targets, total in totals.items():
        if len(targets) == 1 and states[targets[0]] is None:
            states[targets[0]] = total
            continue
        for target, part in zip(targets, total.chunk(len(targets), dim=1), strict=True):
            states[target] = accumulate(states[target], part)


def accumulate(total: Tensor | None, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """`total` + `scale` · `value`, in place."""
    if total is None:
        return value.clone(memory_format=torch.channels_last) if scale is None else value * scale
    return total.add_(value) if scale is None else total.addcmul_(value, scale)


def _normalised(term: Term, source: Source, scale: Tensor | None) -> Tensor:
    """The term's values side by side, (N, E C, H', W'), weighted."""
    ops, norms = term.ops, term.norms
    if isinstance(ops[0], Norm):
        return batch_norm(norms, source.x, scale)
    if isinstance(ops[0], ConvNorm | FactorizedReduce):
        value = conv2d(ops[0].grids(source.x).relu(), ops[0].joint_kernel(ops))
        return batch_norm(norms, value, scale)
    if layers := term.layers:
        value = separable(source, layers[0])
        for before, layer in pairwise(layers):
            between = batch_norm([op.norm for op in before], value)
            value = separable(Source(between, len(layer)), layer)
        return batch_norm(norms, value, scale)
    if norms is None:
        value = ops[0](source.x)
    else:
        first, *others = norms
        value = batch_norm([first], ops[0].pool(source.x))
        if first.training and first.track_running_stats:
            for other in others:
                record_statistics([other], first.running_mean, first.running_var)
    channels = value.shape[1]
    value = torch.cat([value] * len(ops), dim=1)
    return value if scale is None else value * scale.repeat_interleave(channels)[:, None, None]


def separable(source: Source, ops: Sequence[DepthwiseSeparable]) -> Tensor:
    """What separable convolutions give before their batch norms, side by side."""
    first = ops[0].depthwise
    depthwise = joined([op.depthwise.weight for op in ops])
    pointwise = joined([op.pointwise.weight for op in ops])
    x = source.rectified(len(ops))
    x = conv2d(x, depthwise, None, first.stride, first.padding, first.dilation, len(depthwise))
    return conv2d(x, pointwise, groups=len(ops))


class _Concatenate(torch.autograd.Function):
    """Concatenation of channels whose gradients are dense.

    PyTorch returns the gradients as slices of one tensor; its batch norm's backward is twenty times
    slower on those, and many of them start from each node.
    """

    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        parts = gradient.split(ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)
