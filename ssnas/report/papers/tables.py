"""The papers' tables, measured beside reported: CSV for programs and Markdown for people."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from ssnas.config.decide import MULTI_LABEL_DECISIONS
from ssnas.errors import InputError
from ssnas.report.papers.compare import paired
from ssnas.report.papers.declared import Row, Table
from ssnas.report.papers.records import Record, Records
from ssnas.report.run import FIGURES

log = logging.getLogger(__name__)

# The texts of cells without a figure.
NOT_RUN = "not run"
NOT_RECORDED = "not recorded"
UNREADABLE = "unreadable"
REPORTED_ONLY = "reported only"
NONE = "–"
# Between the different data sets or devices of one system's seeds.
AND = " + "

# Columns that the compact form of a table leaves out; the latter if the rows agree in them.
_DETAILS = {"system", "multiply-adds (M)", "seeds", "scale", "data", "search (s)", "training (s)"}
_DETAILS |= {"device", "source", "note"}
_UNLESS_DIFFERENT = {"image size", "epochs"}


class _Unit(NamedTuple):
    title: str
    factor: float
    decimals: int


_UNITS = {
    "image_size": _Unit("image size", 1, 0),
    "epochs": _Unit("epochs", 1, 0),
    "parameters": _Unit("parameters (M)", 1e-6, 3),
    "multiply_adds": _Unit("multiply-adds (M)", 1e-6, 1),
    **{
        key: _Unit(f"{title} (%)", 100, 2) if percent else _Unit(title, 1, 3)
        for key, (title, percent) in FIGURES.items()
    },
}
# Figures under another decision than the published one, such as `natural.accuracy`.
_UNITS |= {
    f"{decision}.{key}": _UNITS[key]._replace(title=f"{decision}: {_UNITS[key].title}")
    for decision in MULTI_LABEL_DECISIONS
    for key in FIGURES
}


@dataclass(frozen=True)
class _Line:
    """A row of a table at one scale, with the seeds that its system and its reference have run.

    `declared` counts the system's seeds in papers/rows.yaml.
    """

    row: Row
    scale: str
    declared: int
    runs: Sequence[Record]
    reference: Row | None
    reference_runs: Sequence[Record]

    def figures(self, key: str) -> dict[int, float]:
        """The test figure by seed, in the unit that is shown."""
        return _numbers(self.runs, "figures", key, self.row.prefix or "")


class _Column(NamedTuple):
    """A column of a table.

    Attributes:
        of: the rows that have figures in it: all, those of a system, those that have run, or
            those whose network has (a reference predictor has none).
    """

    title: str
    of: Literal["all", "system", "run", "network"]
    cell: Callable[[_Line], str]


def table_cells(table: Table, scale: str, records: Records) -> list[dict[str, str]]:
    """Fill the cells of a paper's table at one scale, every row with the same columns.

    Figures are mean ± sample standard deviation (n) over the seeds that have run; in a table of
    cross-validated systems over the folds of all seeds. Parameters and multiply-adds show a
    deviation only where seeds differ, as searched networks may; seconds are means.

    A file that is malformed makes its row's cells read "unreadable", and is named in the log.
    """
    columns = _columns(table)
    lines = [_line(table, row, scale, records) for row in table.rows]
    errors: dict[str, None] = {}
    cells = [{column.title: _fill(column, line, errors) for column in columns} for line in lines]
    for error in errors:
        log.warning("%s", error)
    return cells


def _line(table: Table, row: Row, scale: str, records: Records) -> _Line:
    def runs(of: Row | None) -> list[Record]:
        return records.of(of.kind, of.system, scale) if of and of.system else []

    declared, reference = runs(row), table.reference(row)
    have_run, reference_runs = (
        [run for run in candidates if run.has_run] for candidates in (declared, runs(reference))
    )
    return _Line(row, scale, len(declared), have_run, reference, reference_runs)


def _fill(column: _Column, line: _Line, errors: dict[str, None]) -> str:
    if column.of == "network" and line.row.prefix:
        return NONE
    if column.of != "all" and not line.row.system:
        return REPORTED_ONLY
    if column.of in ("run", "network") and not line.runs:
        return NOT_RUN
    try:
        return column.cell(line)
    except InputError as error:
        errors[str(error)] = None
        return UNREADABLE


def _columns(table: Table) -> list[_Column]:
    columns = [
        _Column("method", "all", lambda line: line.row.method),
        _Column("system", "all", lambda line: line.row.system or NONE),
        _Column("image size", "run", partial(_network, key="image_size")),
        _Column("epochs", "network", partial(_network, key="epochs")),
    ]
    for key in ("parameters", "multiply_adds"):
        columns.append(_Column(_UNITS[key].title, "network", partial(_network, key=key)))
        columns += _reported(table, key)
    over, figure = (", over folds", _over_folds) if table.cross_validated else ("", _over_seeds)
    for key in table.figures:
        columns.append(_Column(_UNITS[key].title + over, "run", partial(figure, key=key)))
        columns += _reported(table, key)
    if name := table.reference_name():
        title = f"{_UNITS[table.figures[0]].title}, difference to {name}"
        columns.append(_Column(title, "run", partial(_difference, key=table.figures[0])))
    return [
        *columns,
        _Column("seeds", "system", lambda line: f"{len(line.runs)} of {line.declared}"),
        _Column("scale", "system", lambda line: line.scale),
        _Column("data", "run", partial(_distinct, what="data", text=_provenance)),
        _Column("search (s)", "network", partial(_seconds, what="search")),
        _Column("training (s)", "network", partial(_seconds, what="training")),
        _Column("device", "network", partial(_distinct, what="training", text=_device)),
        _Column("source", "all", lambda line: line.row.source or NONE),
        _Column("note", "all", lambda line: line.row.note or NONE),
    ]


def _reported(table: Table, key: str) -> list[_Column]:
    """Make the column of published figures, if there are any, with the decimals of the finest.

    YAML reads the 21.80 that a paper prints as 21.8.
    """
    reported = [row.reported[key] for row in table.rows if key in row.reported]
    printed = (str(figure).partition(".")[2] for figure in reported)
    decimals = max(map(len, printed), default=0)

    def cell(line: _Line) -> str:
        value = line.row.reported.get(key)
        return NONE if value is None else f"{value:.{decimals}f}"

    return [_Column(f"{_UNITS[key].title}, reported", "all", cell)] if reported else []


def _numbers(runs: Iterable[Record], what: str, key: str, prefix: str = "") -> dict[int, float]:
    """Read by seed, for the seeds that have it, a number in the unit that is shown."""
    numbers = {run.seed: run.number(what, prefix + key) for run in runs}
    factor = _UNITS[key].factor if key in _UNITS else 1
    return {seed: value * factor for seed, value in numbers.items() if value is not None}


def _network(line: _Line, key: str) -> str:
    """Write a fact of the network, with a deviation only where seeds differ."""
    values = list(_numbers(line.runs, "network", key).values())
    if values and len(set(values)) == 1:
        return f"{values[0]:.{_UNITS[key].decimals}f}"
    return _mean_std(values, _UNITS[key].decimals)


def _over_seeds(line: _Line, key: str) -> str:
    return _mean_std(list(line.figures(key).values()), _UNITS[key].decimals)


def _over_folds(line: _Line, key: str) -> str:
    """Write a figure over the folds of all seeds, from each seed's mean and deviation."""
    means, factor, decimals = line.figures(key), _UNITS[key].factor, _UNITS[key].decimals
    if not means:
        return NOT_RECORDED
    stds = _numbers(line.runs, "figures", f"{key}_std")
    folds = _numbers(line.runs, "figures", "folds")
    groups = [(m, factor * stds.get(s, 0.0), int(folds.get(s, 1))) for s, m in means.items()]
    return plus_minus(*_pooled(groups), decimals)


def _pooled(groups: Sequence[tuple[float, float, int]]) -> tuple[float, float | None, int]:
    """Mean, sample deviation and number of the values of all groups (mean, deviation, number).

    (N − 1) s² = Σ_g [(n_g − 1) s_g² + n_g (m_g − m)²].
    """
    number = sum(n for *_, n in groups)
    mean = sum(n * m for m, _, n in groups) / number
    if number == 1:
        return mean, None, 1
    squares = sum((n - 1) * std**2 + n * (m - mean) ** 2 for m, std, n in groups)
    return mean, math.sqrt(squares / (number - 1)), number


def _difference(line: _Line, key: str) -> str:
    figures, reference = line.figures(key), line.reference
    if not figures:
        return NOT_RECORDED
    if reference is None or line.row == reference:
        return NONE
    if not line.reference_runs:
        return f"{reference.method}: {NOT_RUN}"
    comparison = paired(_numbers(line.reference_runs, "figures", key), figures)
    return comparison.text(_UNITS[key].decimals) if comparison else "no common seed"


def _seconds(line: _Line, what: str) -> str:
    if not any(what in run.files for run in line.runs):
        return NONE
    values = _numbers(line.runs, what, "seconds").values()
    return f"{statistics.fmean(values):.0f}" if values else NOT_RECORDED


def _distinct(line: _Line, what: str, text: Callable[[Mapping[str, Any]], str]) -> str:
    documents = [document for run in line.runs if (document := run.read(what))]
    return AND.join(dict.fromkeys(map(text, documents))) or NOT_RECORDED


def _provenance(data: Mapping[str, Any]) -> str:
    facts = [str(data[key]) for key in ("provenance", "note") if data.get(key)]
    facts = facts or [str(data.get("origin", "of unrecorded origin"))]
    images, size = data.get("images"), data.get("image_size")
    if isinstance(images, dict) and isinstance(images.get("train"), int):
        facts.append(f"{images['train']:,} training images")
    if isinstance(size, list):
        facts.append(f"{' × '.join(map(str, size[:2]))} pixels")
    return f"{data.get('source', 'unnamed')} ({'; '.join(facts)})"


def _device(cost: Mapping[str, Any]) -> str:
    device, threads = str(cost.get("device", "unnamed")), cost.get("threads")
    return f"{device}, {threads} thread{'s' if threads != 1 else ''}" if threads else device


def _mean_std(values: Sequence[float], decimals: int) -> str:
    if not values:
        return NOT_RECORDED
    std = statistics.stdev(values) if len(values) > 1 else None
    return plus_minus(statistics.fmean(values), std, len(values), decimals)


def plus_minus(mean: float, std: float | None, n: int, decimals: int = 2) -> str:
    """Write mean ± standard deviation (n) over n runs, without the deviation for one run.

    >>> plus_minus(10.914, 0.126, 3), plus_minus(10.914, None, 1)
    ('10.91 ± 0.13 (3)', '10.91 (1)')
    """
    deviation = "" if std is None or n == 1 else f" ± {std:.{decimals}f}"
    return f"{mean:.{decimals}f}{deviation} ({n})"


def has_run(row: Mapping[str, str]) -> bool:
    """Tell whether the cells are those of a system of which at least one seed has run."""
    return row["seeds"] != REPORTED_ONLY and not row["seeds"].startswith("0 ")


def compact(rows: Sequence[Mapping[str, str]]) -> str:
    """Write a paper's table as Markdown, without the columns on how its figures came about.

    Args:
        rows: cells by column, at least one row, as `table_cells` gives them.
    """
    measured = pd.DataFrame([row for row in rows if has_run(row)], columns=list(rows[0]))
    distinct = measured.where(~measured.isin([NOT_RECORDED, NONE])).nunique()
    left_out = _DETAILS | {column for column in _UNLESS_DIFFERENT if distinct[column] < 2}
    return markdown([{c: text for c, text in row.items() if c not in left_out} for row in rows])


def write_tables(tables: Mapping[str, Table], records: Records, folder: Path) -> str:
    """Write every table at every scale to `folder`/<scale>/<table>.csv and .md.

    Returns:
        the tables that have results, in their compact form.
    """
    texts = []
    for scale in records.scales:
        for key, table in tables.items():
            rows = table_cells(table, scale, records)
            write_table(rows, folder / scale / key, f"**{table.title}**, scale `{scale}`")
            if any(map(has_run, rows)):
                texts.append(f"{table.title}, scale {scale}\n\n{compact(rows)}")
    return "\n".join(texts) or "No row of the papers' tables has run."


def write_table(rows: Sequence[Mapping[str, str]], path: Path, heading: str) -> None:
    """Write the same cells to `path`.csv and, below `heading`, to `path`.md.

    Args:
        rows: cells by column, at least one row, all with the same columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    csv, page = (path.with_name(f"{path.name}.{suffix}") for suffix in ("csv", "md"))
    pd.DataFrame(rows).to_csv(csv, index=False, lineterminator="\n", encoding="utf-8")
    page.write_text(f"{heading}\n\n{markdown(rows)}", encoding="utf-8")


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Write a Markdown table; a bar in a cell is escaped, a line break becomes a space.

    >>> print(markdown([{"a": "1|2", "b": "three"}]), end="")
    | a    | b     |
    | ---- | ----- |
    | 1\\|2 | three |
    """
    lines = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in cells]
        for cells in (list(rows[0]), *(list(row.values()) for row in rows))
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)
