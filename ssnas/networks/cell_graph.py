"""Cells by the engine: the sums of `Cell.forward`, computed side by side.

The operations of one kind on edges that leave one state read the same tensor, so the engine
computes them as one wide operation; all terms of a node are normalised, weighted and added up
together. The result equals `Cell.forward` up to rounding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssnas.engine.batch_norm import joined
from ssnas.engine.graph import Graph, accumulate, concatenated
from ssnas.engine.op_group import OpGroup, describe
from ssnas.engine.watch import Watch
from ssnas.networks.cell import Cell
from ssnas.networks.operations import Zero, channel_shuffle
from ssnas.networks.space import EDGES, NUM_INPUTS, NUM_NODES, NUM_STATES


class CellGraph:
    """Cells that each read the outputs of the two before, as one graph of the engine.

    With partial channels there is one cell, computed state by state: its channel shuffle is linear,
    so it is applied to the sum over a node's edges.

    Args:
        cells: the cells.
        before: groups of operations that come before them, each making one state.
    """

    def __init__(
        self, cells: Sequence[Cell] | nn.ModuleList, before: Sequence[OpGroup] = ()
    ) -> None:
        self._cells, self.before = cells, before
        self._forget()

    @property
    def cells(self) -> list[Cell]:
        """The cells, as they are now."""
        return [cast(Cell, cell) for cell in self._cells]

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its own modules anew."""
        copied = CellGraph(self._cells, self.before)
        return vars(copied)

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._graphs: dict[int, Graph] = {}
        self._leaving: list[_LeavingEdges] = []
        self._shared: list[OpGroup] = []

    def takes(self, x: Tensor) -> bool:
        """Tell whether the engine may stand in for the cells' own `forward` on this tensor.

        A module that was exchanged since the last call makes the graph anew.
        """
        if torch.compiler.is_compiling():
            return False
        if self._watch is None or self._watch.changed():
            self._forget()
            before = [op for group in self.before for op in group.ops]
            cells = [self._cells] if isinstance(self._cells, nn.Module) else self.cells
            self._watch = Watch([*before, *cells])
            self._leaving = [_LeavingEdges(cell) for cell in self.cells]
            self._shared = [group for leaving in self._leaving for group in leaving.shared()]
        return self._watch.allows(x) and all(group.agrees() for group in self._shared)

    def __call__(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> list[Sequence[Tensor]]:
        """The two inputs of the first cell, and then the nodes of every cell.

        Args:
            inputs: the tensors that the first cell reads, one or two, or those that `before` reads.
            weights: w(α) of every cell; see `Cell.forward`.
        """
        distinct = [x for i, x in enumerate(inputs) if all(x is not y for y in inputs[:i])]
        if self.cells[0].partial > 1:
            return [[inputs[0]], [inputs[-1]], self._by_states(distinct, weights[0])]
        count = len(distinct)
        if count not in self._graphs:
            self._graphs[count] = self._graph(count)
        states = [*distinct, *_all(self._graphs[count](distinct, self._scale(weights)))]
        first = count + len(self.before)
        ends = range(first + NUM_STATES, len(states) + 1, NUM_STATES)
        nodes = [states[end - NUM_NODES : end] for end in ends]
        return [[states[len(self.before)]], [states[first - 1]], *nodes]

    def _scale(self, weights: Sequence[Tensor | None]) -> Tensor | None:
        """The weights w_o of all groups, one after the other."""
        if weights[0] is None:
            return None
        parts = [
            leaving.ordered(table)
            for leaving, table in zip(self._leaving, weights, strict=True)
            if table is not None
        ]
        return joined(parts)

    def _graph(self, inputs: int) -> Graph:
        groups, first = [*self.before], inputs + len(self.before)
        s0: tuple[int, ...] = (len(self.before),)
        s1: tuple[int, ...] = (first - 1,)
        for leaving in self._leaving:
            groups += leaving.input_groups(s0, s1, first)
            for start in range(NUM_STATES - 1):
                groups += leaving.groups(start, first + start, first)
            first += NUM_STATES
            s0, s1 = s1, tuple(range(first - NUM_NODES, first))
        return Graph(groups, inputs, first - inputs)

    def _by_states(self, inputs: Sequence[Tensor], weights: Tensor | None) -> list[Tensor]:
        """The nodes of the one cell, of channels that operations see and channels that bypass."""
        (cell,), (leaving,) = self.cells, self._leaving
        count = len(inputs)
        if count not in self._graphs:
            groups = leaving.input_groups((0,), (count - 1,), count)
            self._graphs[count] = Graph(groups, count, NUM_INPUTS)
        states = _all(self._graphs[count](inputs))
        scale = self._scale([weights])
        scales = [None] * (NUM_STATES - 1) if scale is None else scale.split(leaving.counts)
        sums: list[Tensor | None] = [None] * NUM_NODES
        bypassed: list[Tensor | None] = [None] * NUM_NODES
        for start in range(NUM_STATES - 1):
            seen, other = cell.split(start, states[start])
            # One dense copy spares every pooling a copy of its own.
            seen = seen.contiguous(memory_format=torch.channels_last)
            for edge, node in leaving.edges[start]:
                beta = None if weights is None else weights[edge].sum()
                if other is not None:
                    bypassed[node] = accumulate(bypassed[node], other, beta)
            sums = leaving.from_state(start)([seen], scales[start], sums)
            node = start + 1 - NUM_INPUTS
            if node >= 0:
                joint = concatenated(_all([sums[node], bypassed[node]]))
                states.append(channel_shuffle(joint, cell.partial))
        return states[NUM_INPUTS:]


def _all(states: Sequence[Tensor | None]) -> list[Tensor]:
    """The states, each of which an operation enters."""
    return [state for state in states if state is not None]


class _LeavingEdges:
    """The edges of a cell by the state that they leave, and their operations by kind."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.edges = [
            [
                (edge, target - NUM_INPUTS)
                for edge, (source, target) in enumerate(EDGES)
                if source == start and str(edge) in cell.edges
            ]
            for start in range(NUM_STATES - 1)
        ]
        self._kinds = [self._by_kind(edges) for edges in self.edges]
        self.counts = [sum(len(edges) for _, edges in kinds) for kinds in self._kinds]
        entered = {EDGES[edge][1] for kinds in self._kinds for _, edges in kinds for edge in edges}
        self._missing = [node for node in range(NUM_INPUTS, NUM_STATES) if node not in entered]
        self._from_state: dict[int, Graph] = {}

    def _by_kind(self, leaving: Sequence[tuple[int, int]]) -> list[tuple[str, list[int]]]:
        """Each operation but `none` with the edges that carry it, side by side if alike."""
        kinds: dict[Hashable, tuple[str, list[int]]] = {}
        for edge, _ in leaving:
            for name, op in self.cell.ops(edge).items():
                if isinstance(op, Zero):
                    continue
                description = describe(op)
                # Operations that the engine does not know are computed one by one.
                alike = (edge,) if description is None else description.signature
                kinds.setdefault((name, type(description), alike), (name, []))[1].append(edge)
        return list(kinds.values())

    def ordered(self, table: Tensor) -> Tensor:
        """The weights of the groups, start by start, from w(α), (14, ops)."""
        prepare(self.cell, self)
        return table.flatten().index_select(0, self.cell.get_buffer(ORDER))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """For each weight of the groups, start by start, its position in w(α), (14, ops)."""
        width = max((len(self.cell.ops(int(edge))) for edge in self.cell.edges), default=0)
        return tuple(
            edge * width + list(self.cell.ops(edge)).index(name)
            for kinds in self._kinds
            for name, edges in kinds
            for edge in edges
        )

    def input_groups(self, s0: tuple[int, ...], s1: tuple[int, ...], first: int) -> list[OpGroup]:
        """The operations that bring the cell's inputs to its channels and size.

        Args:
            s0, s1: the states of the graph that the inputs consist of.
            first: the state of the graph that is the cell's state 0.
        """
        ops = self.cell.preprocess0, self.cell.preprocess1
        descriptions = [describe(op) for op in ops]
        if s0 == s1 and None not in descriptions:
            signatures = [(type(d), d.signature) for d in descriptions if d is not None]
            if signatures[0] == signatures[1]:
                return [OpGroup(ops, (first, first + 1), s0, weighted=False)]
        return [
            OpGroup([op], (first + i,), sources, weighted=False)
            for i, (op, sources) in enumerate(zip(ops, (s0, s1), strict=True))
        ]

    def groups(self, start: int, source: int, first: int) -> list[OpGroup]:
        """The operations on all edges that leave a state, by kind.

        Args:
            start: the state.
            source: the state of the graph that it is.
            first: the state of the graph that the cell's state 0 is, or would be.
        """
        groups = [
            OpGroup(
                [self.cell.ops(edge)[name] for edge in edges],
                tuple(first + EDGES[edge][1] for edge in edges),
                (source,),
            )
            for name, edges in self._kinds[start]
        ]
        if start == 0 and self._missing:
            nodes = tuple(first + node for node in self._missing)
            zeros = [Zero(self.cell.stride(start)) for _ in nodes]
            groups.append(OpGroup(zeros, nodes, (source,), weighted=False))
        return groups

    def shared(self) -> list[OpGroup]:
        """The groups of which the engine computes one operation for all."""
        groups = [group for start in range(NUM_STATES - 1) for group in self.groups(start, 0, 0)]
        return [group for group in groups if group.shares]

    def from_state(self, start: int) -> Graph:
        """The operations that leave one state, from it to the nodes."""
        if start not in self._from_state:
            groups = self.groups(start, 0, 1 - NUM_INPUTS)
            self._from_state[start] = Graph(groups, 1, NUM_NODES)
        return self._from_state[start]


ORDER = "_order"


def prepare(cell: Cell, leaving: _LeavingEdges | None = None) -> Cell:
    """Keep the order of a cell's weights beside them, and return the cell.

    As a buffer it moves with the cell: to copy it in a step would make an accelerator wait.
    """
    leaving = leaving or _LeavingEdges(cell)
    if cell.weight_order != leaving.order:
        order = torch.tensor(leaving.order, dtype=torch.long, device=cell.device)
        cell.register_buffer(ORDER, order, persistent=False)
        cell.weight_order = leaving.order
    return cell
