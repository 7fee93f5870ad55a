"""The two cells of a genotype, drawn as in the DARTS paper (Liu et al. 2019, Figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.textpath import TextPath

from ssnas.report.style import (
    FAINT,
    INK,
    KINDS,
    MUTED,
    PAPER,
    op_colour,
    op_style,
    save,
    state_name,
    styled,
)

if TYPE_CHECKING:
    from ssnas.networks.genotype import Edge, Genotype

# One unit is one pixel of a picture shown 900 pixels wide.
WIDTH, PANEL, GAP, LEGEND = 900, 332, 14, 40
OUTPUT = 6
# Six states and the output: placed so that the full graph of 14 edges has room for its labels.
PLACES = np.array(
    [(62, 233), (62, 63), (296, 150), (406, 250), (575, 60), (710, 186), (842, 152)], dtype=float
)
HALF_SIZE = np.array([(34, 17), (34, 17), *[(18, 18)] * 4, (30, 17)], dtype=float)
TITLE_PLACE, TITLE_SIZE = np.array([90.0, PANEL - 32.0]), np.array([72.0, 14.0])
FONT = 9.5
_CARD, _PLAIN = "#f7f9fb", "#aab2bd"
_SWEEPS = 8
_STEPS = np.linspace(0, 1, 29)[:, None]
_BENDS = np.array([0.0, *(sign * b for b in (0.1, 0.2, 0.3, 0.42) for sign in (1, -1))])
_TIMES = np.linspace(0.2, 0.8, 13)


@dataclass
class Arrow:
    """One arrow of the drawing: its bend (matplotlib's arc3 `rad`) and where its label sits.

    `op` is None for a node's way to the output.
    """

    source: int
    target: int
    op: str | None
    bend: float = 0.0
    time: float = 0.5

    def curve(self, bend: float | np.ndarray, times: float | np.ndarray) -> np.ndarray:
        """Points (..., 2) of the quadratic Bézier curve; `bend` and `times` broadcast with 2."""
        start, end = PLACES[self.source], PLACES[self.target]
        along = end - start
        control = (start + end) / 2 + bend * np.array([along[1], -along[0]])
        return (1 - times) ** 2 * start + 2 * times * (1 - times) * control + times**2 * end

    @property
    def points(self) -> np.ndarray:
        """The chosen curve, sampled, shape (S, 2)."""
        return self.curve(self.bend, _STEPS)

    @property
    def label_place(self) -> np.ndarray:
        """The centre of the label's box."""
        return self.curve(self.bend, self.time)

    @property
    def label_size(self) -> np.ndarray:
        """Half width and half height of the label's box."""
        return np.array([_text_width(self.op or "") / 2 + 8, 11.0])


@cache
def _text_width(text: str) -> float:
    return TextPath((0, 0), text, size=FONT).get_extents().width * 100 / 72


def draw_genotype(genotype: Genotype, png: Path, svg: Path) -> None:
    """Draw the normal and the reduction cell, one above the other, as PNG and as SVG.

    Op names stand on their edges; the colour is the op's kind. Equal genotypes give equal bytes.
    """
    height = 2 * PANEL + GAP + LEGEND
    with styled():
        figure, axes = canvas(height)
        draw_cell(axes, "Normal cell", genotype.normal, LEGEND + PANEL + GAP)
        draw_cell(axes, "Reduction cell", genotype.reduce, LEGEND)
        draw_legend(axes, {edge.op for edge in (*genotype.normal, *genotype.reduce)})
        save(figure, png, dpi=200)
        save(figure, svg, kind="svg")


def canvas(height: float) -> tuple[Figure, Axes]:
    """Make an empty picture, WIDTH by `height`, whose axes count its pixels."""
    figure = Figure(figsize=(WIDTH / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def arrange(edges: Sequence[Edge]) -> list[Arrow]:
    """Bend the arrows of `edges`, and of the nodes' ways to the output, and place their labels.

    A small coordinate descent: each arrow in turn takes the bend and the label place that
    overlap least with the others. Deterministic.
    """
    arrows = [Arrow(*edge) for edge in edges]
    arrows += [Arrow(node, OUTPUT, None) for node in range(2, OUTPUT)]
    for _ in range(_SWEEPS):
        last = [(arrow.bend, arrow.time) for arrow in arrows]
        for arrow in arrows:
            others = [other for other in arrows if other is not arrow]
            costs = _curve_costs(arrow, others)[:, None] + _label_costs(arrow, others)
            bend, time = np.unravel_index(np.argmin(costs), costs.shape)
            arrow.bend, arrow.time = float(_BENDS[bend]), float(_TIMES[time])
        if last == [(arrow.bend, arrow.time) for arrow in arrows]:
            break
    return arrows


def _curve_costs(arrow: Arrow, others: list[Arrow]) -> np.ndarray:
    """Cost of each of the bends while the other arrows stay, shape (B,)."""
    curves = arrow.curve(_BENDS[:, None, None], _STEPS)
    costs = 120 * _BENDS**2 + 100 * _outside(curves, np.full(2, 4.0)).sum(axis=1)
    for state in set(range(len(PLACES))) - {arrow.source, arrow.target}:
        costs += 100 * _within(curves, PLACES[state], HALF_SIZE[state] + 8).sum(axis=1)
    for other in others:
        if other.op is not None:
            costs += 8 * _within(curves, other.label_place, other.label_size + 1).sum(axis=1)
        if (other.source, other.target) == (arrow.source, arrow.target):
            costs += 400 * (np.abs(other.bend - _BENDS) < 0.19)
    middle = curves[:, 6:-6, None, None]  # arrows may meet at a shared state
    gaps = np.linalg.norm(middle - np.stack([other.points for other in others]), axis=-1)
    return costs + 1.5 * (gaps.min(axis=-1) < 9).sum(axis=(1, 2))


def _label_costs(arrow: Arrow, others: list[Arrow]) -> np.ndarray:
    """Cost of each place of the label, for each of the bends, shape (B, T)."""
    if arrow.op is None:
        return np.zeros((len(_BENDS), len(_TIMES)))
    places, size = arrow.curve(_BENDS[:, None, None], _TIMES[:, None]), arrow.label_size
    costs = 60 * (_TIMES - 0.45) ** 2 + 400 * _outside(places, size)
    for place, half in zip(PLACES, HALF_SIZE, strict=True):
        costs += 400 * _within(places, place, size + half + 5)
    costs += 400 * _within(places, TITLE_PLACE, size + TITLE_SIZE)
    for other in others:
        if other.op is not None:
            costs += 400 * _within(places, other.label_place, size + other.label_size + 2)
        # A label on a foreign curve reads as that curve's.
        costs += 8 * _within(places[:, :, None], other.points, size + 1).sum(axis=-1)
    return costs


def _within(points: np.ndarray, centre: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Tell which `points` (..., 2) lie in the box of half size `half` around `centre`."""
    return np.all(np.abs(points - centre) < half, axis=-1)


def _outside(points: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Tell which boxes of half size `margin` around `points` (..., 2) leave the panel."""
    low, high = margin + 12, np.array([WIDTH, PANEL]) - margin - 12
    return np.any((points < low) | (points > high), axis=-1)


def draw_cell(axes: Axes, title: str, edges: Sequence[Edge], bottom: float) -> None:
    """Draw the panel of one cell, WIDTH by PANEL, with its lower edge at `bottom`."""
    card = (6, bottom + 4), WIDTH - 12, PANEL - 8
    axes.add_patch(_rounded(*card, 14, facecolor=_CARD, edgecolor=FAINT, linewidth=0.8))
    axes.text(26, bottom + PANEL - 32, title, size=13, weight="bold", va="center")
    shift = np.array([0.0, bottom])
    states = [_draw_state(axes, state, PLACES[state] + shift) for state in range(len(PLACES))]
    for arrow in arrange(edges):
        _draw_arrow(axes, arrow, states, shift)


def _rounded(
    corner: Sequence[float], width: float, height: float, radius: int, **look: object
) -> FancyBboxPatch:
    box = f"round,pad=0,rounding_size={radius}"
    return FancyBboxPatch((corner[0], corner[1]), width, height, boxstyle=box, **look)  # type: ignore[arg-type]


def _draw_state(axes: Axes, state: int, place: np.ndarray) -> Patch:
    (x, y), half, node = place, HALF_SIZE[state], 2 <= state < OUTPUT
    patch: Patch
    if node:
        patch = Circle((x, y), half[0], facecolor=PAPER, edgecolor=INK, linewidth=1.6, zorder=4)
    else:
        patch = _rounded(
            place - half, 2 * half[0], 2 * half[1], 8, facecolor=INK, edgecolor=INK, zorder=4
        )
    axes.add_patch(patch)
    name, weight = "cₖ" if state == OUTPUT else state_name(state), "bold" if node else "normal"
    text = axes.text(x, y, name, size=12, weight=weight, color=INK if node else PAPER, zorder=5)
    text.set(ha="center", va="center_baseline")
    return patch


def _draw_arrow(axes: Axes, arrow: Arrow, states: Sequence[Patch], shift: np.ndarray) -> None:
    colour = _PLAIN if arrow.op is None else op_colour(arrow.op)
    axes.add_patch(
        FancyArrowPatch(
            PLACES[arrow.source] + shift,
            PLACES[arrow.target] + shift,
            connectionstyle=f"arc3,rad={arrow.bend}",
            patchA=states[arrow.source],
            patchB=states[arrow.target],
            shrinkA=0,
            shrinkB=2,
            arrowstyle="-|>,head_length=5,head_width=2.6",
            color=colour,
            linewidth=1.0 if arrow.op is None else 1.7,
            zorder=1 if arrow.op is None else 2,
        )
    )
    if arrow.op is not None:
        x, y = arrow.label_place + shift
        box = {"boxstyle": "round,pad=0.28,rounding_size=0.5", "fc": colour, "ec": _CARD}
        text = axes.text(x, y, arrow.op, size=FONT, color=PAPER, bbox=box, zorder=6)
        text.set(ha="center", va="center_baseline")


def draw_legend(axes: Axes, ops: set[str]) -> None:
    """Say below the panels which colours stand for the kinds of `ops`."""
    used = {op_style(op)[0] for op in ops}
    handles = [
        Line2D([], [], color=colour, linewidth=6, solid_capstyle="round", label=kind)
        for kind, colour in KINDS.items()
        if kind in used
    ]
    handles.append(Line2D([], [], color=_PLAIN, label="concatenation"))
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.004),
        ncols=len(handles),
        fontsize=9.5,
        labelcolor=MUTED,
        handlelength=1.2,
        columnspacing=1.8,
    )
