"""A cell: operations on the edges of a small graph, relaxed (supernet) or chosen (network)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssnas.engine.batch_norm import joined
from ssnas.engine.graph import Graph, accumulate, concatenated
from ssnas.engine.op_group import Term
from ssnas.errors import InputError
from ssnas.networks.operations import (
    ConvNorm,
    FactorizedReduce,
    Zero,
    build,
    bypass,
    channel_shuffle,
)
from ssnas.networks.space import EDGES, NUM_INPUTS, NUM_NODES, NUM_STATES


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
        self._missing = [node for node in range(NUM_INPUTS, NUM_STATES) if node not in entered]
        self._graphs: dict[int, Graph] = {}
        if partial > 1:
            self._from_state = [
                Graph(self.terms(start, 0, 1 - NUM_INPUTS), 1, NUM_NODES) for start in starts
            ]

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
        if self.partial > 1:
            return self._bypassed(s0, s1, weights)
        chain = Chain([self], graphs=self._graphs)
        return concatenated(chain(_distinct(s0, s1), [weights])[-1])

    def input_terms(self, s0: tuple[int, ...], s1: tuple[int, ...], first: int) -> list[Term]:
        """What brings the cell's inputs to its channels and size.

        Args:
            s0, s1: the states, in the graph that the terms are for, that the inputs consist of.
            first: the state there that is the cell's state 0.
        """
        ops = self.preprocess0, self.preprocess1
        if s0 == s1 and type(ops[0]) is type(ops[1]):
            return [Term(ops, (first, first + 1), s0, weighted=False)]
        return [
            Term([op], (first + i,), own, weighted=False)
            for i, (op, own) in enumerate(zip(ops, (s0, s1), strict=True))
        ]

    def terms(self, start: int, source: int, first: int) -> list[Term]:
        """The operations on all edges that leave a state, by kind.

        Args:
            start: the state.
            source: the state that it is in the graph that the terms are for.
            first: the one there that state 0 is, or would be.
        """
        terms = [
            Term(
                [self.edges[str(edge)][name] for edge in edges],
                tuple(first + EDGES[edge][1] for edge in edges),
                (source,),
            )
            for name, edges in self._kinds[start].items()
        ]
        if start == 0 and self._missing:
            nodes = tuple(first + node for node in self._missing)
            zeros = [Zero(self._stride(start)) for _ in nodes]
            terms.append(Term(zeros, nodes, (source,), weighted=False))
        return terms

    def scale(self, weights: Tensor | None) -> Tensor | None:
        """The w_o of all terms, start by start."""
        return None if weights is None else weights.flatten().index_select(0, self._order)

    def _bypassed(self, s0: Tensor, s1: Tensor, weights: Tensor | None) -> Tensor:
        """The nodes' outputs, of channels that operations see and others that bypass them."""
        given = _distinct(s0, s1)
        count = len(given)
        if count not in self._graphs:
            terms = self.input_terms((0,), (count - 1,), count)
            self._graphs[count] = Graph(terms, count, NUM_INPUTS)
        states = self._graphs[count](given)
        scale = self.scale(weights)
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
            sums = self._from_state[start]([seen], scales[start], sums)
            node = start + 1 - NUM_INPUTS
            if node >= 0:
                joint = concatenated([sums[node], bypassed[node]])
                states.append(channel_shuffle(joint, self.partial))
        return concatenated(states[NUM_INPUTS:])


class Chain:
    """Cells that each read the outputs of the two before, computed as one graph.

    Args:
        cells: without partial channels.
        before: what comes before them: terms that make one state each.
        graphs: keeps the graphs for one and for two given tensors.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        before: Sequence[Term] = (),
        graphs: dict[int, Graph] | None = None,
    ) -> None:
        self.cells, self.before = cells, before
        self._graphs = {} if graphs is None else graphs

    def __call__(
        self, given: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> list[list[Tensor]]:
        """The two inputs of the first cell, and then the nodes of every cell.

        Args:
            given: what the first cell reads, one or two tensors, or `before`.
            weights: of every cell; see `Cell.forward`.
        """
        count = len(given)
        if count not in self._graphs:
            self._graphs[count] = self._graph(count)
        scale = None
        if weights[0] is not None:
            pairs = zip(self.cells, weights, strict=True)
            scale = joined([cell.scale(own) for cell, own in pairs])
        states = [*given, *self._graphs[count](given, scale)]
        first = count + len(self.before)
        ends = range(first + NUM_STATES, len(states) + 1, NUM_STATES)
        nodes = [states[end - NUM_NODES : end] for end in ends]
        return [[states[len(self.before)]], [states[first - 1]], *nodes]

    def _graph(self, given: int) -> Graph:
        terms, first = [*self.before], given + len(self.before)
        s0, s1 = (len(self.before),), (first - 1,)
        for cell in self.cells:
            terms += cell.input_terms(s0, s1, first)
            for start in range(NUM_STATES - 1):
                terms += cell.terms(start, first + start, first)
            first += NUM_STATES
            s0, s1 = s1, tuple(range(first - NUM_NODES, first))
        return Graph(terms, given, first - given)


def _distinct(s0: Tensor, s1: Tensor) -> list[Tensor]:
    return [s0] if s0 is s1 else [s0, s1]


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
