"""A cell: operations on the edges of a small graph, relaxed (supernet) or chosen (network)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.mixed import Graph, accumulate, concatenated
from ssnas.operations import (
    ConvNorm,
    FactorizedReduce,
    Zero,
    build,
    bypass,
    channel_shuffle,
)
from ssnas.space import EDGES, NUM_INPUTS, NUM_NODES, NUM_STATES
from ssnas.terms import Term


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
    - all terms of a node are normalised, weighted and added up together (`mixed.Graph`);
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
        self._kinds = [_edges_by_operation(leaving, ops) for leaving in self._leaving]
        edges = [[(e, op) for op, own in kinds.items() for e in own] for kinds in self._kinds]
        self._edges_leaving = [len(own) for own in edges]
        width = max((len(own) for own in ops.values()), default=0)
        places = [edge * width + ops[edge].index(op) for own in edges for edge, op in own]
        order = torch.tensor(places, dtype=torch.long)
        # A buffer, so that it moves with the cell: copying it in a step would wait for the device.
        self.register_buffer("_order", order, persistent=False)
        entered = {EDGES[edge][1] for own in edges for edge, _ in own}
        self._missing = set(range(NUM_INPUTS, NUM_STATES)) - entered
        self._graphs: dict[tuple, Graph] = {}

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
        shared = s0 is s1 and type(self.preprocess0) is type(self.preprocess1)
        given = [s0] if shared else [s0, s1]
        count = len(given)
        if self.partial > 1:
            graph = self._graph(count, NUM_INPUTS, self._inputs, count)
            return self._bypassed(graph(given, [None] * NUM_INPUTS), weights)
        graph = self._graph(count, NUM_STATES, self._all_terms, count)
        sums = graph(given, self._before(s1), self._scale(weights))
        return concatenated(sums[NUM_INPUTS:])

    def _graph(
        self, given: int, sums: int, terms: Callable[..., list[Term]], *arguments: int
    ) -> Graph:
        """That of terms(*arguments), made once, with its plan."""
        key = terms.__name__, *arguments
        if key not in self._graphs:
            self._graphs[key] = Graph(terms(*arguments), given, sums)
        return self._graphs[key]

    def _inputs(self, given: int) -> list[Term]:
        """What brings the cell's inputs, one or two tensors, to its channels and size."""
        ops = self.preprocess0, self.preprocess1
        if given == 1:
            return [Term(ops, (0, 1), 0, weighted=False)]
        return [Term([op], (i,), i, weighted=False) for i, op in enumerate(ops)]

    def _all_terms(self, given: int) -> list[Term]:
        terms = self._inputs(given)
        for start in range(NUM_STATES - 1):
            terms += self._terms(start, given + start, 0)
        return terms

    def _terms(self, start: int, source: int, first: int) -> list[Term]:
        """The operations on all edges that leave a state, by kind.

        Args:
            start: the state.
            source: its index, and
            first: the state that is the first sum, in the graph that the terms are for.
        """
        return [
            Term(
                [self.edges[str(edge)][name] for edge in edges],
                tuple(EDGES[edge][1] - first for edge in edges),
                source,
            )
            for name, edges in self._kinds[start].items()
        ]

    def _scale(self, weights: Tensor | None) -> Tensor | None:
        """The w_o of all terms, start by start."""
        return None if weights is None else weights.flatten().index_select(0, self._order)

    def _before(self, s1: Tensor) -> list[Tensor | None]:
        """Zeros for the nodes that nothing enters."""
        if not self._missing:
            return [None] * NUM_STATES
        n, _, height, width = Zero(self._stride(0))(s1[:, :1]).shape
        channels = self.preprocess1.norm.num_features
        zeros = s1.new_zeros((n, height, width, channels)).permute(0, 3, 1, 2)
        return [zeros if state in self._missing else None for state in range(NUM_STATES)]

    def _bypassed(self, states: list[Tensor], weights: Tensor | None) -> Tensor:
        """The nodes' outputs, of channels that operations see and others that bypass them."""
        scale = self._scale(weights)
        scales = [None] * len(self._leaving) if scale is None else scale.split(self._edges_leaving)
        sums: list[Tensor | None] = [None] * NUM_NODES
        bypassed: list[Tensor | None] = [None] * NUM_NODES
        for start, leaving in enumerate(self._leaving):
            seen, other = self._split(start, states[start])
            # One dense copy spares every pooling its own.
            seen = seen.contiguous(memory_format=torch.channels_last)
            for edge, node in leaving:
                own = None if weights is None else weights[edge].sum()
                bypassed[node] = accumulate(bypassed[node], other, own)
            graph = self._graph(1, NUM_NODES, self._terms, start, 0, NUM_INPUTS)
            sums = graph([seen], sums, scales[start])
            node = start + 1 - NUM_INPUTS
            if node >= 0:
                if sums[node] is None:
                    sums[node] = Zero(self._stride(start))(seen)
                joint = concatenated([sums[node], bypassed[node]])
                states.append(channel_shuffle(joint, self.partial))
        return concatenated(states[NUM_INPUTS:])


def _edges_by_operation(
    leaving: Sequence[tuple[int, int]], ops: Mapping[int, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """For each operation but `none` the edges that carry it, of those that leave one state."""
    edges: dict[str, tuple[int, ...]] = {}
    for edge, _ in leaving:
        for name in ops[edge]:
            if name != "none":
                edges[name] = (*edges.get(name, ()), edge)
    return edges
