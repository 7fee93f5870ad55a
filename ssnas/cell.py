"""A cell: operations on the edges of a small graph, relaxed (supernet) or chosen (network)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.mixed import Term, accumulate, add_mixed
from ssnas.operations import (
    ConvNorm,
    FactorizedReduce,
    Zero,
    build,
    bypass,
    channel_shuffle,
)
from ssnas.space import EDGES, NUM_INPUTS, NUM_NODES, NUM_STATES


class Cell(nn.Module):
    """x_j = Σ_{i<j} Σ_o w_o(α_ij) o(x_i); the output is the concatenation of the nodes.

    With partial channel connections (PC-DARTS, Xu et al. 2020; K = `partial` > 1) the operations
    see the first C/K channels of a state, x_i', and the others, x_i'', bypass them:

        x_j = Σ_{i<j} shuffle_K([Σ_o w_o o(x_i'), (Σ_o w_o) bypass(x_i'')])

    where the bypass is the identity, or 2×2 max pooling at stride 2, and the shuffle of K groups
    shows the next edges other channels. Since w_o is the edge's normalised β times a softmax,
    Σ_o w_o is that β, which so multiplies the whole edge.

    `forward` equals `forward_by_definition`, term by term, and does less work in fewer kernels:

    - operations of one kind on edges that leave one state read the same tensor, so they are
      computed side by side as one wide operation, and its poolings once;
    - all kinds are normalised, weighted and added to the nodes together (`mixed.add_mixed`);
    - the shuffle is linear, so it is applied to the sum over a node's edges.

    Args:
        ops: for each edge of `space.EDGES`, by its index, the operations that it carries.
        previous: channels of the two inputs.
        channels: C, the channels of each node.
        reduce: whether edges from the inputs have stride 2.
        previous_reduce: whether the last cell halved the resolution, so that input 0 is twice
            as large as input 1.
        affine: whether batch norms have affine parameters.
        partial: K; the operations see C/K channels.

    Raises:
        InputError: if K does not divide C.
    """

    def __init__(
        self,
        ops: Mapping[int, Sequence[str]],
        previous: tuple[int, int],
        channels: int,
        reduce: bool,
        previous_reduce: bool,
        affine: bool,
        partial: int = 1,
    ) -> None:
        super().__init__()
        divisors = [divisor for divisor in range(1, channels + 1) if channels % divisor == 0]
        if partial not in divisors:
            raise InputError(
                f"search.partial: found {partial}, which does not divide the {channels} channels; "
                f"choose from {', '.join(map(str, divisors))}"
            )
        self.reduce = reduce
        self.partial = partial
        self._seen = channels // partial
        adapt = FactorizedReduce if previous_reduce else ConvNorm
        self.preprocess0 = adapt(previous[0], channels, affine)
        self.preprocess1 = ConvNorm(previous[1], channels, affine)
        self.edges = nn.ModuleDict(
            {
                str(edge): nn.ModuleDict(
                    {op: build(op, self._seen, self._stride(source), affine) for op in ops[edge]}
                )
                for edge, (source, _) in enumerate(EDGES)
                if ops.get(edge)
            }
        )
        starts = range(NUM_STATES - 1)
        self._leaving = [
            [
                (edge, target - NUM_INPUTS)
                for edge, (source, target) in enumerate(EDGES)
                if source == start and str(edge) in self.edges
            ]
            for start in starts
        ]
        self._ops = {edge: tuple(ops[edge]) for edge in range(len(EDGES)) if ops.get(edge)}
        self._kinds = [_edges_by_operation(self._leaving[start], ops) for start in starts]

    def _stride(self, source: int) -> int:
        return 2 if self.reduce and source < NUM_INPUTS else 1

    def _split(self, source: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channels that operations see, and what the others bring to the edges' targets."""
        if self.partial == 1:
            return state, None
        seen, other = state.split((self._seen, state.shape[1] - self._seen), dim=1)
        return seen, bypass(other, self._stride(source))

    def forward_by_definition(
        self, s0: Tensor, s1: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The equations above, one operation at a time: the specification of `forward`."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(NUM_INPUTS, NUM_STATES):
            terms = []
            for edge, (source, target) in enumerate(EDGES):
                if target == node and str(edge) in self.edges:
                    row = None if weights is None else weights[edge]
                    terms += self._edge_by_definition(edge, source, states[source], row)
            states.append(sum(terms))
        return torch.cat(states[NUM_INPUTS:], dim=1)

    def _edge_by_definition(
        self, edge: int, source: int, state: Tensor, weights: Tensor | None
    ) -> list[Tensor]:
        """The terms that an edge adds to its node."""
        seen, other = self._split(source, state)
        ops = self.edges[str(edge)].values()
        if weights is None:
            values = [op(seen) for op in ops]
        else:
            values = [weight * op(seen) for weight, op in zip(weights, ops, strict=True)]
        if other is None:
            return values
        other = other if weights is None else weights.sum() * other
        joint = torch.cat([sum(values), other], dim=1)
        return [nn.functional.channel_shuffle(joint, self.partial)]

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | None = None) -> Tensor:
        """Outputs of the nodes, concatenated.

        Args:
            s0, s1: outputs of the cell before last and of the last cell, (N, channels, H, W).
            weights: w(α), (14, ops), or None where every operation, and a bypass, counts once.

        Returns:
            (N, 4 C, H', W'), H' = H of `s1`, halved (rounded up) in a reduction cell.
        """
        states = self._inputs(s0, s1)
        scales = None if weights is None else [row.unbind() for row in weights.unbind()]
        sums: list[Tensor | None] = [None] * NUM_NODES
        bypassed: list[Tensor | None] = [None] * NUM_NODES
        for start, leaving in enumerate(self._leaving):
            seen, other = self._split(start, states[start])
            if other is not None:
                # One dense copy spares every pooling its own.
                seen = seen.contiguous(memory_format=torch.channels_last)
                for edge, node in leaving:
                    scale = None if weights is None else weights[edge].sum()
                    bypassed[node] = accumulate(bypassed[node], other, scale)
            terms, own = self._terms(start, scales)
            sums = add_mixed(sums, seen, terms, own)
            node = start + 1 - NUM_INPUTS
            if node >= 0:
                if sums[node] is None:
                    sums[node] = Zero(self._stride(start))(seen)
                if self.partial > 1:
                    joint = _Concatenate.apply(sums[node], bypassed[node])
                    sums[node] = channel_shuffle(joint, self.partial)
                states.append(sums[node])
        return _Concatenate.apply(*states[NUM_INPUTS:])

    def _inputs(self, s0: Tensor, s1: Tensor) -> list[Tensor]:
        """The cell's inputs, brought to its channels and size."""
        first, second = self.preprocess0, self.preprocess1
        if s0 is s1 and type(first) is type(second):
            return add_mixed([None, None], s0, [Term([first, second], (0, 1))])
        return [
            *add_mixed([None], s0, [Term([first], (0,))]),
            *add_mixed([None], s1, [Term([second], (0,))]),
        ]

    def _terms(
        self, start: int, scales: list[tuple[Tensor, ...]] | None
    ) -> tuple[list[Term], list[Tensor] | None]:
        """The operations on all edges that leave a state, by kind, and their w_o."""
        terms, own = [], []
        for name, edges in self._kinds[start].items():
            ops = [self.edges[str(edge)][name] for edge in edges]
            if isinstance(ops[0], Zero):
                continue
            terms.append(Term(ops, tuple(EDGES[edge][1] - NUM_INPUTS for edge in edges)))
            if scales is not None:
                weights = [scales[edge][self._ops[edge].index(name)] for edge in edges]
                own.append(torch.stack(weights))
        return terms, own if own else None


def _edges_by_operation(
    leaving: Sequence[tuple[int, int]], ops: Mapping[int, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """For each operation the edges that carry it, of those that leave one state."""
    edges: dict[str, tuple[int, ...]] = {}
    for edge, _ in leaving:
        for name in ops[edge]:
            edges[name] = (*edges.get(name, ()), edge)
    return edges


class _Concatenate(torch.autograd.Function):
    """Concatenation of channels whose gradients are dense.

    PyTorch returns the gradients as slices of one tensor; batch norm's backward is twenty times
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
