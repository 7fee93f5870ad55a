"""Mixed operations, Σ_o w_o o(x), of all edges that leave a state: the search's hot path.

Computed one operation at a time, a search step keeps thousands of intermediate tensors, and waits
for memory far longer than it computes. Here operations of one kind are computed side by side as
one wide operation: on a CPU by kernels of the project's own (`fused`), everywhere else, or without
a C++ compiler, by PyTorch's functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ssnas import fused, kernels
from ssnas.distributed import active
from ssnas.norms import batch_norm, joined, record_statistics
from ssnas.operations import ConvNorm, DepthwiseSeparable, FactorizedReduce, Pool, SepConv


@dataclass(frozen=True)
class Term:
    """Operations of one kind on edges that leave a state.

    Args:
        ops: of equal channels, kernels and strides; `nn.Identity` for the state itself.
        edges: for each of them the index of the sum that it is added to.
    """

    ops: Sequence[nn.Module]
    edges: tuple[int, ...]

    @property
    def norms(self) -> list[nn.BatchNorm2d] | None:
        """The batch norms at the operations' ends, if they have any."""
        return None if isinstance(self.ops[0], nn.Identity) else [op.norm for op in self.ops]

    @property
    def layers(self) -> list[Sequence[DepthwiseSeparable]]:
        """The separable convolutions that the operations consist of, one layer after another."""
        match self.ops[0]:
            case SepConv():
                return [[op.first for op in self.ops], [op.second for op in self.ops]]
            case DepthwiseSeparable():
                return [self.ops]
        return []


def add_mixed(
    sums: Sequence[Tensor | None],
    state: Tensor,
    terms: Sequence[Term],
    scales: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """Add Σ_o w_o o(x) to what several nodes have so far.

    Args:
        sums: of each edge that leaves the state, (N, C, H', W'), or None for zeros; they may be
            changed in place.
        state: x, (N, C, H, W).
        terms: the operations.
        scales: for each term the w_o of its edges, (edges,), or None for 1.

    Returns:
        the new sums.
    """
    if not terms:
        return list(sums)
    compute = _fused if _usable(state) else _composed
    return compute(sums, state, terms, scales)


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


def _composed(
    sums: Sequence[Tensor | None],
    state: Tensor,
    terms: Sequence[Term],
    scales: Sequence[Tensor] | None,
) -> list[Tensor | None]:
    found, source = list(sums), Source(state)
    totals: dict[tuple[int, ...], Tensor] = {}
    for index, term in enumerate(terms):
        value = _normalised(term, source, None if scales is None else scales[index])
        total = totals.get(term.edges)
        totals[term.edges] = value if total is None else total + value
    for edges, total in totals.items():
        if len(edges) == 1 and found[edges[0]] is None:
            found[edges[0]] = total
            continue
        for edge, part in zip(edges, total.chunk(len(edges), dim=1), strict=True):
            found[edge] = accumulate(found[edge], part)
    return found


def accumulate(total: Tensor | None, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """`total` + `scale` · `value`, in place."""
    if total is None:
        return value.clone(memory_format=torch.channels_last) if scale is None else value * scale
    return total.add_(value) if scale is None else total.addcmul_(value, scale)


def _normalised(term: Term, source: Source, scale: Tensor | None) -> Tensor:
    """The term's values side by side, (N, E C, H', W'), weighted."""
    ops, norms = term.ops, term.norms
    if isinstance(ops[0], ConvNorm | FactorizedReduce):
        value = conv2d(ops[0].grids(source.x).relu(), ops[0].joint_kernel(ops))
        return batch_norm(norms, value, scale)
    if layers := term.layers:
        value = separable(source, layers[0])
        for before, layer in pairwise(layers):
            between = batch_norm([op.norm for op in before], value)
            value = separable(Source(between, len(layer)), layer)
        return batch_norm(norms, value, scale)
    value = source.x
    if norms is not None:
        first, *others = norms
        value = batch_norm([first], ops[0].pool(value))
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


# By the compiled kernels


def _fused(
    sums: Sequence[Tensor | None],
    state: Tensor,
    terms: Sequence[Term],
    scales: Sequence[Tensor] | None,
) -> list[Tensor | None]:
    inputs = fused.Inputs()
    entered = sorted({edge for term in terms for edge in term.edges})
    parts = [_part(term, [entered.index(e) for e in term.edges], inputs) for term in terms]
    scale = None if scales is None else joined(scales)
    before = [sums[edge] for edge in entered]
    new = fused.mix(parts, inputs, state, before, scale, _channels(terms, state))
    found = list(sums)
    for edge, total in zip(entered, new, strict=True):
        found[edge] = total
    return found


def _part(term: Term, edges: list[int], inputs: fused.Inputs) -> fused.Part:
    match term.ops[0]:
        case nn.Identity():
            return fused.State(edges)
        case Pool() as op:
            return fused.Pooled(edges, term.norms, inputs, op.pool)
        case ConvNorm() | FactorizedReduce() as op:
            kernel = op.joint_kernel(term.ops)
            return fused.Projected(edges, term.norms, inputs, kernel, op.stride)
    return fused.Convolved(edges, term.layers, inputs)


def _channels(terms: Sequence[Term], state: Tensor) -> int:
    """Of the sums: a term changes them only where all do."""
    norms = terms[0].norms
    return state.shape[1] if norms is None else norms[0].num_features
