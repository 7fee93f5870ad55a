"""The papers' figures: several systems in one picture, beside the CSV that holds its numbers.

Y24 is Yan 2024 (arXiv 2406.16949), H24 is Tang 2024 (arXiv 2406.07028).
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ssnas.config.load import read_yaml
from ssnas.config.schema import build
from ssnas.errors import InputError
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.space import CELL_KINDS
from ssnas.report.cells import GAP, LEGEND, PANEL, canvas, draw_cell, draw_legend
from ssnas.report.files import read_csv, read_json, read_text
from ssnas.report.papers.declared import choose, mapping
from ssnas.report.papers.records import Records
from ssnas.report.style import (
    ACCENT,
    DARK,
    INK,
    KINDS,
    MUTED,
    integer_ticks,
    literal,
    save,
    shorten,
    styled,
)

log = logging.getLogger(__name__)

_COLOURS = (DARK, ACCENT, KINDS["dilated convolution"], KINDS["skip connection"], INK)
_DASHES = ("-", "--", "-.", ":")
_NUMBERED = 12  # bars of a panel that are still wide enough for a number each
_NOTE_WIDTH = 130  # characters


@dataclass(frozen=True)
class PaperFigure:
    """One entry of papers/figures.yaml.

    `kind` is a key of `FIGURE_KINDS`; `systems` maps labels in the picture to names of systems.
    """

    title: str
    kind: str
    systems: Mapping[str, str] = field(default_factory=dict)


def read_figures(path: Path, records: Records) -> dict[str, PaperFigure]:
    """Read the figures that papers/figures.yaml defines, by key.

    Raises:
        InputError: if the file is missing, is not YAML, lacks a key or has an unknown one, or
            names an unknown kind or system.
    """
    document = read_yaml(path)
    return {str(key): _figure(f"{path}: {key}", entry, records) for key, entry in document.items()}


def _figure(where: str, entry: Any, records: Records) -> PaperFigure:
    entry = mapping(where, entry, "title", "kind", "systems")
    systems = mapping(f"{where}.systems", entry.pop("systems"))
    if not systems:
        raise InputError(f"{where}.systems: found {{}}; accepted is a mapping label: system")
    figure: PaperFigure = build(PaperFigure, where, entry)
    choose(f"{where}.kind", [figure.kind], FIGURE_KINDS)
    known = records.systems(FIGURE_KINDS[figure.kind].entries)
    for label, system in systems.items():
        choose(f"{where}.systems.{label}", [system], known)
    return replace(figure, systems={str(label): system for label, system in systems.items()})


def write_figure(figure: PaperFigure, scale: str, records: Records, target: Path) -> None:
    """Write the figure's numbers and its picture as `target`.csv, .png and .svg.

    The CSV is in long form, its first column is the system's label; of each system the first seed
    that has run is shown. A system whose file cannot be read is logged and left out, and the
    picture says so. If no system is left, nothing is written and the three files of an earlier
    run are removed. Equal inputs give equal bytes.

    Args:
        figure: the declaration of the figure.
        scale: the scale of the systems; the picture names it.
        records: the entries and their files.
        target: the path of the three files, without a suffix.
    """
    kind = FIGURE_KINDS[figure.kind]
    tables: dict[str, pd.DataFrame] = {}
    missing: dict[str, list[str]] = {"not run": [], "file not usable": []}
    for label, system in figure.systems.items():
        runs = (run.folder / kind.file for run in records.of(kind.entries, system, scale))
        file = next((path for path in runs if path.is_file()), None)
        try:
            if file is None:
                missing["not run"].append(label)
            else:
                tables[label] = kind.read(file)
        except InputError as error:
            log.warning("%s: %r is left out: %s", target.name, label, error)
            missing["file not usable"].append(label)
    csv, png, svg = (target.with_name(f"{target.name}.{end}") for end in ("csv", "png", "svg"))
    if not tables:
        for path in (csv, png, svg):
            path.unlink(missing_ok=True)
        return
    points = pd.concat(tables, names=["system"]).reset_index("system").reset_index(drop=True)
    csv.parent.mkdir(parents=True, exist_ok=True)
    points.to_csv(csv, index=False, lineterminator="\n", encoding="utf-8")
    left_out = [f"{why}: {'; '.join(labels)}" for why, labels in missing.items() if labels]
    facts = " · ".join([f"Scale {scale} · one seed each", *kind.notes, *left_out])
    note = literal("\n".join(textwrap.wrap(facts, _NOTE_WIDTH)))
    with styled():
        picture = kind.draw(tables, list(figure.systems), literal(figure.title), note)
        save(picture, png)
        save(picture, svg, kind="svg")


# --- readers: a file of one system to a table


def _read_distribution(file: Path) -> pd.DataFrame:
    table = _numeric(read_csv(file, "class", "name", "train"), file, "class", "train")
    return table[["class", "name", "train"]].rename(columns={"train": "images"})


def _read_curves(file: Path) -> pd.DataFrame:
    columns = ["epoch", "val_balanced_accuracy", "val_accuracy"]
    return _numeric(read_csv(file, *columns), file, *columns)[columns]


def _read_cells(file: Path) -> pd.DataFrame:
    genotype = Genotype.from_json(read_text(file))
    edges = [(cell, *edge) for cell in CELL_KINDS for edge in getattr(genotype, cell)]
    return pd.DataFrame(edges, columns=["cell", *Edge._fields])


def _read_mixing_ratio(file: Path) -> pd.DataFrame:
    columns = ["ratio", "accuracy"]
    sweep = read_json(file).get("mixing_ratio")
    try:
        points = [{column: point[column] for column in columns} for point in sweep or ()]
    except (TypeError, KeyError):
        points = []
    if not points:
        raise InputError(
            f"{file}: mixing_ratio: found {sweep!r}; accepted is a list of "
            '{"ratio": 0.5, "accuracy": 0.6, …}, which evaluate writes for bilateral networks'
        )
    return _numeric(pd.DataFrame(points), file, *columns).sort_values("ratio", kind="stable")


def _read_changes(file: Path) -> pd.DataFrame:
    """Count from the second epoch on the edges whose best op has changed since the epoch before.

    The best op is argmax over o ≠ none of w_o; ties go to the first. Counted are the edges of the
    normal and the reduction cell, at most 28; the heads' cells are no part of the backbone.
    """
    table = read_csv(file, "epoch", "cell", "edge", "op", "weight")
    table = _numeric(table, file, "epoch", "weight")
    table = table[table["cell"].isin(CELL_KINDS) & (table["op"] != "none")]
    chosen = table.loc[table.groupby(["epoch", "cell", "edge"])["weight"].idxmax()]
    best = chosen.pivot(index="epoch", columns=["cell", "edge"], values="op")
    if len(best) < 2 or best.isna().any(axis=None):
        raise InputError(
            f"{file}: found {len(best)} epochs of {best.shape[1]} edges; accepted are two epochs "
            "or more, each with all edges"
        )
    changed = (best != best.shift()).sum(axis=1).iloc[1:]
    return changed.rename("changed").reset_index()


def _numeric(table: pd.DataFrame, file: Path, *columns: str) -> pd.DataFrame:
    """Make finite numbers of `columns`."""
    numbers = table[list(columns)].apply(pd.to_numeric, errors="coerce")
    for column in columns:
        wrong = table[column][~np.isfinite(numbers[column])]
        if len(wrong):
            raise InputError(
                f"{file}: {column}: found {wrong.iloc[0]!r}; accepted are finite numbers"
            )
    return table.assign(**numbers)


# --- pictures: the tables by label, all labels in order, a title and the small print

Tables = Mapping[str, pd.DataFrame]


def _draw_distributions(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    figure = _titled(0.9 + 2.3 * rows, title, note)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (label, table) in zip(grid.flat, tables.items(), strict=False):
        bars = axes.bar(table["class"], table["images"], width=0.8, color=DARK)
        if len(table) <= _NUMBERED:
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7, color=MUTED)
        axes.set_title(f"{shorten(label, 40)}: {table['images'].sum():,} images")
        axes.set(xlabel="class")
        integer_ticks(axes.xaxis, most=_NUMBERED)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.margins(y=0.12)
        axes.grid(axis="y")
    for axes in grid[:, 0]:
        axes.set_ylabel("training images")
    for axes in grid.flat[len(tables) :]:
        axes.set_axis_off()
    return figure


def _draw_lines(
    tables: Tables,
    systems: Sequence[str],
    title: str,
    note: str,
    *,
    height: float,
    x: str,
    panels: Mapping[str, Mapping[str, Any]],
    marker: str | None = "o",
) -> Figure:
    """Draw one line a system, which has the same look whichever others have run.

    Args:
        height: of the picture, in inches.
        x: the column along the x axis.
        panels: for each column to show what its axes are set to.
    """
    figure = _titled(height, title, note)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (y, properties) in zip(grid, panels.items(), strict=True):
        for label, table in tables.items():
            place = systems.index(label)
            axes.plot(
                table[x],
                table[y],
                _DASHES[place % len(_DASHES)],
                color=_COLOURS[place % len(_COLOURS)],
                label=shorten(label, 40),
                marker=marker if len(table) > 1 else "o",
                markersize=3.5,
            )
        axes.set(**{"xlabel": x, **properties})
        axes.grid()
        if x == "epoch":
            integer_ticks(axes.xaxis)
        if y == "changed":
            axes.set_ylim(top=max(axes.get_ylim()[1], 1))
            integer_ticks(axes.yaxis)
    handles = grid[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", handlelength=3)
    return figure


def _draw_cells(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    """Draw the searches below each other."""
    heading, top = 40, 46 + 14 * note.count("\n")
    block = heading + 2 * PANEL + GAP
    height = LEGEND + len(tables) * block + top
    figure, axes = canvas(height)
    axes.text(8, height - 8, title, size=12, weight="bold", va="top")
    axes.text(8, height - 30, note, size=8.5, color=MUTED, va="top")
    for place, (label, table) in enumerate(tables.items(), start=1):
        bottom = height - top - place * block
        above = bottom + 2 * PANEL + GAP + heading / 2
        axes.text(26, above - 6, shorten(label, 60), size=14, weight="bold", va="center")
        for cell, name, base in (
            ("normal", "Normal cell", bottom + PANEL + GAP),
            ("reduce", "Reduction cell", bottom),
        ):
            edges = table.loc[table["cell"] == cell, list(Edge._fields)]
            draw_cell(axes, name, [Edge(*edge) for edge in edges.itertuples(index=False)], base)
    draw_legend(axes, {op for table in tables.values() for op in table["op"]})
    return figure


def _titled(height: float, title: str, note: str) -> Figure:
    """Make a figure with its title and, in small print below, its note."""
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    figure.supxlabel(note, x=0.01, ha="left", size=8, color=MUTED)
    return figure


class _Kind(NamedTuple):
    """A kind of figure: the file of which entries it is read from, and how it is drawn."""

    entries: str
    file: str
    read: Callable[[Path], pd.DataFrame]
    draw: Callable[[Tables, Sequence[str], str, str], Figure]
    notes: tuple[str, ...] = ()


FIGURE_KINDS = {
    "distributions": _Kind("datasets", "class_counts.csv", _read_distribution, _draw_distributions),
    "training-curves": _Kind(
        "rows",
        "finetune.csv",
        _read_curves,
        partial(
            _draw_lines,
            height=4.4,
            x="epoch",
            panels={
                "val_balanced_accuracy": {
                    "title": "Stands for a balanced test set",
                    "ylabel": "balanced accuracy, validation",
                },
                "val_accuracy": {
                    "title": "Stands for a long-tailed test set",
                    "ylabel": "accuracy, validation",
                },
            },
            marker=None,
        ),
        ("the curves are of validation images: the test images are read once, after the training",),
    ),
    "cells": _Kind("searches", "genotype.json", _read_cells, _draw_cells),
    "mixing-ratio": _Kind(
        "rows",
        "evaluate.json",
        _read_mixing_ratio,
        partial(
            _draw_lines,
            height=4.6,
            x="ratio",
            panels={
                "accuracy": {
                    "xlim": (-0.02, 1.02),
                    "xlabel": "mixing ratio a (0: the class-balanced head alone, "
                    "1: the instance head alone)",
                    "ylabel": "accuracy on the test images",
                }
            },
        ),
    ),
    "chosen-ops": _Kind(
        "searches",
        "alpha.csv",
        _read_changes,
        partial(
            _draw_lines,
            height=4.2,
            x="epoch",
            panels={"changed": {"ylabel": "edges changed since the epoch before"}},
        ),
        ("28 edges in all",),
    ),
}
