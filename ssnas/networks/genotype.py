"""The genotype: which operation each edge of the two cells keeps, and how it is derived."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssnas.errors import InputError
from ssnas.networks.operations import RELAXATIONS, kept_operations
from ssnas.networks.space import CELL_KINDS, EDGES, NUM_INPUTS, NUM_STATES

RULES = ("argmax", "darts", "threshold", "uniform", "fixed")
MAX_OPS_PER_NODE = 2


class Edge(NamedTuple):
    """Operation `op` from state `source` to state `target`.

    States 0 and 1 are the outputs of the cell before last and of the last cell; states 2 to 5
    are the nodes.
    """

    source: int
    target: int
    op: str


Candidates = list[tuple[float, Edge]]
"""Edges with the weights of their operations."""


@dataclass(frozen=True)
class Genotype:
    """The operations of the normal and of the reduction cell.

    Raises:
        InputError: for an unknown operation, an edge outside the cell, an edge listed twice, or a
            node that nothing feeds.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]

    def __post_init__(self) -> None:
        for kind in CELL_KINDS:
            edges = tuple(sorted(Edge(*edge) for edge in getattr(self, kind)))
            _check_cell(kind, edges)
            object.__setattr__(self, kind, edges)

    def to_json(self) -> str:
        """One line an edge, so that a person can read it and `git diff` shows what changed."""
        cells = []
        for kind in CELL_KINDS:
            lines = [
                f'    {{"from": {edge.source}, "to": {edge.target}, "op": "{edge.op}"}}'
                for edge in sorted(getattr(self, kind), key=lambda e: (e.target, e.source, e.op))
            ]
            cells.append(f'  "{kind}": [\n' + ",\n".join(lines) + "\n  ]")
        return "{\n" + ",\n".join(cells) + "\n}\n"

    @classmethod
    def read(cls, path: Path) -> Genotype:
        """Read the genotype in a file.

        Raises:
            InputError: if the file is missing or holds no genotype.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: not found; `dvc repro` makes it") from error

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Inverse of `to_json`.

        Raises:
            InputError: if the text is not JSON or not of that form.
        """
        try:
            document = json.loads(text)
            cells = {
                kind: tuple(
                    Edge(index(edge["from"]), index(edge["to"]), str(edge["op"]))
                    for edge in document[kind]
                )
                for kind in CELL_KINDS
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"genotype: cannot be read ({type(error).__name__}: {error}); accepted is "
                '{"normal": [{"from": 0, "to": 2, "op": "sep_conv_3x3"}, …], "reduce": […]}'
            ) from error
        return cls(**cells)


def _check_cell(kind: str, edges: tuple[Edge, ...]) -> None:
    for edge in edges:
        if edge.op not in kept_operations():
            known = ", ".join(kept_operations())
            raise InputError(f"genotype: {kind} cell: unknown op {edge.op!r}; choose from {known}")
        if (edge.source, edge.target) not in EDGES:
            raise InputError(
                f"genotype: {kind} cell: no edge {edge.source} -> {edge.target}; edges lead from "
                f"an earlier state to one of the nodes {NUM_INPUTS}..{NUM_STATES - 1}"
            )
    if len(set(edges)) != len(edges):
        raise InputError(f"genotype: {kind} cell: an edge is listed twice with the same op")
    fed = {edge.target for edge in edges}
    isolated = [node for node in range(NUM_INPUTS, NUM_STATES) if node not in fed]
    if isolated:
        raise InputError(
            f"genotype: {kind} cell: nothing feeds node(s) {isolated}; derive with another rule "
            f"({', '.join(RULES)}) or search longer"
        )


def derive(
    weights: Mapping[str, object],
    rule: str = "argmax",
    threshold: float = 0.85,
    op: str = "sep_conv_3x3",
) -> Genotype:
    """Choose the operations that the searched architecture keeps.

    - `argmax` (T21): the best op on every edge; an edge whose best op is `none` is left out.
    - `darts` (Liu et al. 2019): per edge the best op other than `none`, then per node the two
      edges whose best op is strongest.
    - `threshold` (FairDARTS, Chu et al. 2020): per node at most two ops, among those with
      σ(α) > `threshold`; a node with none above it keeps its single strongest op.
    - `uniform`: `op` on every edge, whatever the weights; a baseline.
    - `fixed`: the genotype `FIXED`, whatever the weights; what to take without a search.

    Args:
        weights: for "normal" and "reduce" the op weights w(α), shape (14, ops), edges in the order
            of `space.EDGES`, and ops those of a relaxation, see `operations.RELAXATIONS`.
        rule: one of `RULES`.
        threshold: of the rule `threshold`.
        op: of the rule `uniform`.

    Raises:
        InputError: for an unknown rule or op, NaN weights, or a cell with an isolated node.

    Example:
        >>> from ssnas.networks.space import EDGES
        >>> from ssnas.networks.operations import RELAXATIONS
        >>> weights = np.zeros((len(EDGES), len(RELAXATIONS["sigmoid"])))
        >>> weights[:, RELAXATIONS["sigmoid"].index("skip_connect")] = 0.9
        >>> derive({"normal": weights, "reduce": weights}, "darts").normal[:2]
        (Edge(source=0, target=2, op='skip_connect'), Edge(source=0, target=3, op='skip_connect'))
    """
    rules: dict[str, Callable[[Candidates], list[Edge]]] = {
        "argmax": _argmax,
        "darts": _darts,
        "threshold": lambda candidates: _threshold(candidates, threshold),
        "uniform": lambda candidates: [Edge(*edge, op) for edge in EDGES],
    }
    if rule == "fixed":
        return FIXED
    choose = rules.get(rule)
    if choose is None:
        raise InputError(f"derive.rule: unknown rule {rule!r}; choose from {', '.join(RULES)}")
    columns = {len(ops): ops for ops in RELAXATIONS.values()}
    cells = {}
    for kind in CELL_KINDS:
        table = np.asarray(weights[kind], dtype=float)
        if table.shape not in {(len(EDGES), width) for width in columns}:
            raise InputError(
                f"derive: {kind} weights have shape {table.shape}; accepted is "
                f"({len(EDGES)}, {' or '.join(map(str, sorted(columns)))})"
            )
        if np.isnan(table).any():
            raise InputError(f"derive: the {kind} cell's weights contain NaN")
        candidates = [
            (float(weight), Edge(source, target, op))
            for (source, target), row in zip(EDGES, table, strict=True)
            for op, weight in zip(columns[table.shape[1]], row, strict=True)
        ]
        cells[kind] = tuple(choose(candidates))
    return Genotype(**cells)


FIXED = Genotype(
    normal=(
        Edge(0, 2, "avg_pool_3x3"),
        Edge(1, 2, "dil_conv_5x5"),
        Edge(1, 3, "skip_connect"),
        Edge(2, 3, "avg_pool_3x3"),
        Edge(0, 4, "max_pool_3x3"),
        Edge(3, 4, "skip_connect"),
        Edge(0, 5, "dil_conv_5x5"),
        Edge(2, 5, "max_pool_3x3"),
    ),
    reduce=(
        Edge(0, 2, "sep_conv_5x5"),
        Edge(1, 2, "sep_conv_3x3"),
        Edge(1, 3, "skip_connect"),
        Edge(2, 3, "dil_conv_5x5"),
        Edge(0, 4, "sep_conv_5x5"),
        Edge(2, 4, "sep_conv_3x3"),
        Edge(1, 5, "avg_pool_3x3"),
        Edge(3, 5, "sep_conv_5x5"),
    ),
)
"""A genotype for any images: the best of ten that were drawn at random, see docs/recipes.md."""


def _strongest(candidates: Candidates, count: int) -> Candidates:
    """The `count` heaviest; ties go to the first in the order of edges and ops."""
    return sorted(candidates, key=lambda candidate: -candidate[0])[:count]


def _best_per_edge(candidates: Candidates) -> Candidates:
    by_edge: dict[tuple[int, int], Candidates] = {}
    for weight, edge in candidates:
        by_edge.setdefault((edge.source, edge.target), []).append((weight, edge))
    return [_strongest(group, 1)[0] for group in by_edge.values()]


def _into(node: int, candidates: Candidates) -> Candidates:
    return [(weight, edge) for weight, edge in candidates if edge.target == node]


def _without_none(candidates: Candidates) -> Candidates:
    return [(weight, edge) for weight, edge in candidates if edge.op != "none"]


def _argmax(candidates: Candidates) -> list[Edge]:
    return [edge for _, edge in _without_none(_best_per_edge(candidates))]


def _darts(candidates: Candidates) -> list[Edge]:
    best = _best_per_edge(_without_none(candidates))
    return [
        edge
        for node in range(NUM_INPUTS, NUM_STATES)
        for _, edge in _strongest(_into(node, best), MAX_OPS_PER_NODE)
    ]


def _threshold(candidates: Candidates, threshold: float) -> list[Edge]:
    chosen = []
    for node in range(NUM_INPUTS, NUM_STATES):
        ranked = _strongest(_into(node, _without_none(candidates)), MAX_OPS_PER_NODE)
        above = [edge for weight, edge in ranked if weight > threshold]
        chosen += above or [ranked[0][1]]
    return chosen
