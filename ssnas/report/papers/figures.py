"""The papers' figures: several systems in one picture, beside the CSV that holds its numbers.

Y24 is Yan 2024 (arXiv 2406.16949), H24 is Tang 2024 (arXiv 2406.07028).
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssnas.config.load import read_yaml
from ssnas.config.schema import build
from ssnas.errors import InputError
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.space import CELL_KINDS
from ssnas.report.cells import GAP, LEGEND, PANEL, WIDTH, draw_cell, draw_legend
from ssnas.report.files import read_csv, read_json, read_text
from ssnas.report.papers.declared import choose, mapping, require
from ssnas.report.papers.records import Records
from ssnas.report.style import (
    ACCENT,
    DARK,
    INK,
    KINDS,
    MUTED,
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
    """The figures that papers/figures.yaml defines, by key.

    Raises:
        InputError: if the file is missing, is not YAML, lacks a key or has an unknown one, or
            names an unknown kind or system.
    """
    defined = read_yaml(path).items()
    return {str(key): _figure(f"{path}: {key}", given, records) for key, given in defined}


def _figure(where: str, given: Any, records: Records) -> PaperFigure:
    given = dict(mapping(where, given))
    require(where, given, "title", "kind", "systems")
    systems = mapping(f"{where}.systems", given.pop("systems"))
    if not systems:
        raise InputError(f"{where}.systems: found {{}}; accepted is a mapping label: system")
    figure = build(PaperFigure, where, given)
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
        figure: what to draw.
        scale: the scale of the systems; the picture names it.
        records: the entries and their files.
        target: the path of the three files, without a suffix.
    """
    kind, tables, missing = FIGURE_KINDS[figure.kind], {}, {"not run": [], "file not usable": []}
    for label, system in figure.systems.items():
        file = _file(kind, records, system, scale)
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
    with styled():
        note = _note(scale, kind.note, missing)
        picture = kind.draw(tables, list(figure.systems), figure.title, note)
        save(picture, png)
        save(picture, svg, kind="svg")


def _file(kind: _Kind, records: Records, system: str, scale: str) -> Path | None:
    """What the first seed that has run left; None if none has."""
    files = (record.folder / kind.file for record in records.of(kind.entries, system, scale))
    return next((file for file in files if file.is_file()), None)


def _note(scale: str, of_kind: str, missing: Mapping[str, Sequence[str]]) -> str:
    """The small print of a picture, in lines."""
    left_out = [f"{why}: {'; '.join(labels)}" for why, labels in missing.items() if labels]
    facts = [f"Scale {scale} · one seed each", *([of_kind] if of_kind else []), *left_out]
    return _plain("\n".join(textwrap.wrap(" · ".join(facts), _NOTE_WIDTH)))


def _read_distribution(file: Path) -> pd.DataFrame:
    columns = ["class", "name", "train"]
    table = _numeric(read_csv(file, *columns)[columns], file, "class", "train")
    return table.rename(columns={"train": "images"})


def _read_curves(file: Path) -> pd.DataFrame:
    columns = ["epoch", "val_balanced_accuracy", "val_accuracy"]
    return _numeric(read_csv(file, *columns)[columns], file, *columns)


def _read_cells(file: Path) -> pd.DataFrame:
    genotype = Genotype.from_json(read_text(file))
    edges = [(cell, *edge) for cell in CELL_KINDS for edge in getattr(genotype, cell)]
    return pd.DataFrame(edges, columns=["cell", *Edge._fields])


def _read_mixing_ratio(file: Path) -> pd.DataFrame:
    columns = ["ratio", "accuracy"]
    sweep = read_json(file).get("mixing_ratio")
    if (
        not isinstance(sweep, list)
        or not sweep
        or not all(isinstance(point, dict) and point.keys() >= {*columns} for point in sweep)
    ):
        raise InputError(
            f"{file}: mixing_ratio: found {sweep!r}; accepted is a list of "
            '{"ratio": 0.5, "accuracy": 0.6, …}, which evaluate writes for bilateral networks'
        )
    table = _numeric(pd.DataFrame(sweep)[columns], file, *columns)
    return table.sort_values("ratio", kind="stable")


def _read_changes(file: Path) -> pd.DataFrame:
    """From the second epoch on, the edges whose best op is another than the epoch before.

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
    """`table` with `columns` as finite numbers."""
    numbers = table[list(columns)].apply(pd.to_numeric, errors="coerce")
    for column in columns:
        wrong = table[column][~np.isfinite(numbers[column])]
        if len(wrong):
            raise InputError(
                f"{file}: {column}: found {wrong.iloc[0]!r}; accepted are finite numbers"
            )
    return table.assign(**numbers)


Tables = Mapping[str, pd.DataFrame]


def _draw_distributions(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    figure = _titled((9, 0.9 + 2.3 * rows), title, note)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (label, table) in zip(grid.flat, tables.items(), strict=False):
        bars = axes.bar(table["class"], table["images"], width=0.8, color=DARK)
        if len(table) <= _NUMBERED:
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7, color=MUTED)
        axes.set_title(f"{shorten(label, 40)}: {table['images'].sum():,} images")
        axes.set(xlabel="class")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=_NUMBERED)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.margins(y=0.12)
        axes.grid(axis="y")
    for axes in grid[:, 0]:
        axes.set_ylabel("training images")
    for axes in grid.flat[len(tables) :]:
        axes.set_axis_off()
    return figure


def _draw_curves(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    panels = (
        (
            "Stands for a balanced test set",
            "val_balanced_accuracy",
            "balanced accuracy, validation",
        ),
        ("Stands for a long-tailed test set", "val_accuracy", "accuracy, validation"),
    )
    figure = _titled((9, 4.4), title, note)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, (heading, column, unit) in zip(grid, panels, strict=True):
        _draw_lines(axes, tables, systems, "epoch", column)
        axes.set(title=heading, xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure, axes)


def _draw_mixing_ratio(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    figure = _titled((9, 4.6), title, note)
    axes = figure.subplots()
    _draw_lines(axes, tables, systems, "ratio", "accuracy", marker="o")
    axes.set(
        xlim=(-0.02, 1.02),
        xlabel="mixing ratio a (0: the class-balanced head alone, 1: the instance head alone)",
        ylabel="accuracy on the test images",
    )
    return _with_legend(figure, axes)


def _draw_changes(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    figure = _titled((9, 4.2), title, note)
    axes = figure.subplots()
    _draw_lines(axes, tables, systems, "epoch", "changed", marker="o")
    axes.set(xlabel="epoch", ylabel="edges changed since the epoch before")
    axes.set_ylim(top=max(axes.get_ylim()[1], 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return _with_legend(figure, axes)


def _draw_cells(tables: Tables, systems: Sequence[str], title: str, note: str) -> Figure:
    """The searches below each other: one unit is one pixel of a picture 900 pixels wide."""
    heading, top = 40, 46 + 14 * note.count("\n")
    block = heading + 2 * PANEL + GAP
    height = LEGEND + len(tables) * block + top
    figure = Figure(figsize=(WIDTH / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height), aspect="equal")
    axes.axis("off")
    axes.text(8, height - 8, _plain(title), size=12, weight="bold", va="top")
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


def _draw_lines(
    axes: Axes, tables: Tables, systems: Sequence[str], x: str, y: str, marker: str | None = None
) -> None:
    """One line a system; a system has the same look whichever others have run."""
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
    axes.grid()


def _titled(size: tuple[float, float], title: str, note: str) -> Figure:
    """A figure with its title and, in small print below, its note."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_plain(title), x=0.01, ha="left", size=12, weight="bold")
    figure.supxlabel(note, x=0.01, ha="left", size=8, color=MUTED)
    return figure


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", handlelength=3)
    return figure


def _plain(text: str) -> str:
    """`text` without matplotlib reading two dollar signs as mathematics."""
    return text.replace("$", r"\$")


class _Kind(NamedTuple):
    """A kind of figure: from which file of which entries it is read, and how it is drawn."""

    entries: str
    file: str
    read: Callable[[Path], pd.DataFrame]
    draw: Callable[[Tables, Sequence[str], str, str], Figure]
    note: str


FIGURE_KINDS = {
    "distributions": _Kind(
        "datasets", "class_counts.csv", _read_distribution, _draw_distributions, ""
    ),
    "training-curves": _Kind(
        "rows",
        "finetune.csv",
        _read_curves,
        _draw_curves,
        "the curves are of validation images: the test images are read once, after the training",
    ),
    "cells": _Kind("searches", "genotype.json", _read_cells, _draw_cells, ""),
    "mixing-ratio": _Kind("rows", "evaluate.json", _read_mixing_ratio, _draw_mixing_ratio, ""),
    "chosen-ops": _Kind("searches", "alpha.csv", _read_changes, _draw_changes, "28 edges in all"),
}
