"""The papers' tables, measured beside reported: CSV for programs and Markdown for people."""

from __future__ import annotations

import csv as csv_module
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ssnas.errors import InputError
from ssnas.report.papers.compare import paired
from ssnas.report.papers.declared import Row, Table
from ssnas.report.papers.records import Record, Records
from ssnas.report.run import FIGURES

log = logging.getLogger(__name__)

# What a cell says where there is no figure.
NOT_RUN = "not run"
NOT_RECORDED = "not recorded"
UNREADABLE = "unreadable"
REPORTED_ONLY = "reported only"
NOT_AT_HAND = "not at hand"
NONE = "–"
# Between the different data sets or devices of one system's seeds.
AND = " + "

# Columns that the compact form of a table leaves out.
_DETAILS = ("system", "multiply-adds (M)", "seeds", "scale", "data", "search (s)", "training (s)")
_DETAILS += ("device", "source", "note")


class _Unit(NamedTuple):
    title: str
    factor: float
    decimals: int


_NETWORK = {
    "image_size": _Unit("image size", 1, 0),
    "epochs": _Unit("epochs", 1, 0),
    "parameters": _Unit("parameters (M)", 1e-6, 3),
    "multiply_adds": _Unit("multiply-adds (M)", 1e-6, 1),
}


def _unit(key: str) -> _Unit:
    title, percent = FIGURES[key]
    return _Unit(f"{title} (%)", 100, 2) if percent else _Unit(title, 1, 3)


def plus_minus(mean: float, std: float | None, n: int, decimals: int = 2) -> str:
    """`mean ± std (n)` over n runs, without the deviation for one run."""
    if std is None or n == 1:
        return f"{mean:.{decimals}f} ({n})"
    return f"{mean:.{decimals}f} ± {std:.{decimals}f} ({n})"


@dataclass(frozen=True)
class _Line:
    """One row of a table at one scale, with the seeds that its system and its reference have run.

    `declared` counts the system's seeds in papers/rows.yaml.
    """

    row: Row
    scale: str
    declared: int
    runs: Sequence[Record]
    reference: Row | None
    reference_runs: Sequence[Record]


Cell = Callable[[_Line], str]


def table_cells(table: Table, scale: str, records: Records) -> list[dict[str, str]]:
    """The cells of a paper's table at one scale, every row with the same columns.

    Figures are mean ± sample standard deviation (n) over the seeds that have run; in a table of
    cross-validated systems over the folds of all seeds. Parameters and multiply-adds show a
    deviation only where seeds differ, as searched networks may; seconds are means.

    A file that is malformed makes its row's cells read "unreadable", and is named in the log.
    """
    columns, warned = _columns(table), set()

    def readable(cell: Cell, line: _Line) -> str:
        try:
            return cell(line)
        except InputError as error:
            if str(error) not in warned:
                log.warning("%s", error)
            warned.add(str(error))
            return UNREADABLE

    lines = [_line(table, row, scale, records) for row in table.rows]
    return [{title: readable(cell, line) for title, cell in columns.items()} for line in lines]


def _line(table: Table, row: Row, scale: str, records: Records) -> _Line:
    declared, reference = _records(row, scale, records), table.reference(row)
    runs, reference_runs = (
        [record for record in found if record.has_run]
        for found in (declared, _records(reference, scale, records))
    )
    return _Line(row, scale, len(declared), runs, reference, reference_runs)


def _records(row: Row | None, scale: str, records: Records) -> list[Record]:
    return records.of(row.kind, row.system, scale) if row and row.system else []


def _columns(table: Table) -> dict[str, Cell]:
    """The titles of the columns in order, with what fills them."""
    columns: dict[str, Cell] = {
        "method": lambda line: line.row.method,
        "system": lambda line: line.row.system or NONE,
        "image size": _measured(partial(_spread, key="image_size")),
        "epochs": _network(partial(_spread, key="epochs")),
    }
    for key in ("parameters", "multiply_adds"):
        columns[_NETWORK[key].title] = _network(partial(_spread, key=key))
        columns |= _reported(table, key, _NETWORK[key].title)
    over, figure = (", over folds", _over_folds) if table.cross_validated else ("", _over_seeds)
    for key in table.figures:
        title = _unit(key).title
        columns[title + over] = _measured(partial(figure, key=key))
        columns |= _reported(table, key, title)
    if name := table.reference_name():
        title = f"{_unit(table.figures[0]).title}, difference to {name}"
        columns[title] = _measured(partial(_difference, key=table.figures[0]))
    return columns | {
        "seeds": _of_system(lambda line: f"{len(line.runs)} of {line.declared}"),
        "scale": _of_system(lambda line: line.scale),
        "data": _measured(partial(_distinct, what="data", text=_provenance)),
        "search (s)": _network(partial(_seconds, what="search")),
        "training (s)": _network(partial(_seconds, what="training")),
        "device": _network(partial(_distinct, what="training", text=_device)),
        "source": lambda line: line.row.source or NONE,
        "note": lambda line: line.row.note or NONE,
    }


def _of_system(cell: Cell) -> Cell:
    return lambda line: cell(line) if line.row.system else REPORTED_ONLY


def _measured(cell: Cell) -> Cell:
    return _of_system(lambda line: cell(line) if line.runs else NOT_RUN)


def _network(cell: Cell) -> Cell:
    """A cell that a reference predictor does not have."""
    measured = _measured(cell)
    return lambda line: NONE if line.row.prefix else measured(line)


def _reported(table: Table, key: str, title: str) -> dict[str, Cell]:
    """The column of published figures, all with the decimals of the finest; none if there are none.

    YAML reads the 21.80 that a paper prints as 21.8.
    """

    figures = [row.reported[key] for row in table.rows if row.reported.get(key) is not None]
    decimals = max((len(str(figure).partition(".")[2]) for figure in figures), default=0)

    def cell(line: _Line) -> str:
        if key not in line.row.reported:
            return NONE
        value = line.row.reported[key]
        return NOT_AT_HAND if value is None else f"{value:.{decimals}f}"

    return {f"{title}, reported": cell} if table.reports(key) else {}


def _numbers(runs: Iterable[Record], what: str, key: str, factor: float = 1) -> dict[int, float]:
    """By seed, for the seeds that have the number."""
    found = {run.seed: run.number(what, key) for run in runs}
    return {seed: value * factor for seed, value in found.items() if value is not None}


def _test_figures(line: _Line, key: str) -> dict[int, float]:
    """By seed, in the unit that is shown."""
    return _numbers(line.runs, "figures", (line.row.prefix or "") + key, _unit(key).factor)


def _over_seeds(line: _Line, key: str) -> str:
    values = list(_test_figures(line, key).values())
    return _mean_std(values, _unit(key).decimals) if values else NOT_RECORDED


def _mean_std(values: Sequence[float], decimals: int) -> str:
    std = statistics.stdev(values) if len(values) > 1 else None
    return plus_minus(statistics.fmean(values), std, len(values), decimals)


def _over_folds(line: _Line, key: str) -> str:
    """Over the folds of all seeds, from each seed's mean and deviation."""
    unit, means = _unit(key), _test_figures(line, key)
    if not means:
        return NOT_RECORDED
    stds = _numbers(line.runs, "figures", f"{key}_std", unit.factor)
    folds = _numbers(line.runs, "figures", "folds")
    groups = [(mean, stds.get(s, 0.0), int(folds.get(s, 1))) for s, mean in means.items()]
    return plus_minus(*_pooled(groups), unit.decimals)


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
    reference, other = line.reference, _test_figures(line, key)
    if not other:
        return NOT_RECORDED
    if reference is None or line.row == reference:
        return NONE
    if not line.reference_runs:
        return f"{reference.method}: {NOT_RUN}"
    unit = _unit(key)
    comparison = paired(_numbers(line.reference_runs, "figures", key, unit.factor), other)
    return comparison.text(unit.decimals) if comparison else "no common seed"


def _spread(line: _Line, key: str) -> str:
    """A fact of the network, with a deviation only where seeds differ."""
    unit = _NETWORK[key]
    values = list(_numbers(line.runs, "network", key, unit.factor).values())
    if not values:
        return NOT_RECORDED
    if len(set(values)) > 1:
        return _mean_std(values, unit.decimals)
    return f"{values[0]:.{unit.decimals}f}"


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
    threads = cost.get("threads")
    plural = "" if threads == 1 else "s"
    return f"{cost.get('device', 'unnamed')}" + (f", {threads} thread{plural}" if threads else "")


def has_run(row: Mapping[str, str]) -> bool:
    """Whether the cells are those of a system of which at least one seed has run."""
    return row["seeds"] != REPORTED_ONLY and not row["seeds"].startswith("0 ")


def compact(rows: Sequence[Mapping[str, str]]) -> str:
    """The Markdown of a paper's table without the columns that say how its figures came about.

    The image size, and the epochs of training, stay where rows differ in them.

    Args:
        rows: cells by column, at least one row, as `table_cells` gives them.
    """
    ran = [row for row in rows if has_run(row)]
    alike = [
        column
        for column in ("image size", "epochs")
        if len({row[column] for row in ran} - {NOT_RECORDED, NONE}) < 2
    ]
    columns = [column for column in rows[0] if column not in (*_DETAILS, *alike)]
    return markdown(columns, [[row[column] for column in columns] for row in rows])


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
    columns, cells = list(rows[0]), [list(row.values()) for row in rows]
    csv, page = (path.with_name(f"{path.name}.{suffix}") for suffix in ("csv", "md"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with csv.open("w", newline="", encoding="utf-8") as file:
        csv_module.writer(file, lineterminator="\n").writerows([columns, *cells])
    page.write_text(f"{heading}\n\n{markdown(columns, cells)}", encoding="utf-8")


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped, a line break becomes a space."""
    lines = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (columns, *cells)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)
