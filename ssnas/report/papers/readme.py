"""The block of measured tables in docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ssnas.errors import InputError
from ssnas.report.papers.declared import Table
from ssnas.report.papers.tables import (
    AND,
    NONE,
    NOT_RECORDED,
    NOT_RUN,
    REPORTED_ONLY,
    compact,
    has_run,
)

Rows = Sequence[Mapping[str, str]]

START, END = "<!-- results -->", "<!-- /results -->"
_MAKE = "make it with `dvc repro -s papers/dvc.yaml:tables`"
_LEGEND = f"""\
How to read the tables:

- A measured figure is mean ± sample standard deviation (n) over n seeds, of cross-validated \
systems over n folds, on test images that nothing was chosen by. "Reported" is what the papers \
print; "{REPORTED_ONLY}" is a system that they quote and that we do not run.
- A difference is the mean over n common seeds ± the half width of its 95 % interval (paired t); \
it is "beyond the noise" if that interval leaves out 0. One seed says nothing of the noise.
- Scale `paper` is the papers' protocol. At any other scale images, channels and epochs are \
reduced: figures compare within their table, not with reported ones."""


def results(tables: Mapping[str, Table], scales: Iterable[str], folder: Path) -> str:
    """Write how to read the tables, those in `folder` that have results, and which have none.

    Tables without results are named by their titles up to the colon.

    Raises:
        InputError: if the CSV file of a table and scale is missing or holds no rows.
    """
    parts, missing = [_LEGEND], []
    for scale in scales:
        rows = {key: _read(folder / scale / f"{key}.csv") for key in tables}
        ran = [key for key, cells in rows.items() if any(map(has_run, cells))]
        parts += [_section(tables[key], scale, rows[key]) for key in ran]
        names = [tables[key].title.partition(":")[0] for key in tables if key not in ran]
        if names:
            missing.append(f"Not run at scale `{scale}`: {'; '.join(names) if ran else 'all'}.")
    return "\n\n".join([*parts, *([" ".join(missing)] if missing else [])])


def replace_block(text: str, content: str) -> str:
    """Put `content` between the two markers of `text`.

    Raises:
        InputError: if a marker is not there exactly once, or they stand in the wrong order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"markers: accepted are one {START} and, after it, one {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{content}\n{END}{rest.split(END)[1]}"


def _read(path: Path) -> Rows:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {_MAKE}")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.empty or "seeds" not in table:
        raise InputError(f"{path}: not a table of rows with a column 'seeds'; {_MAKE}")
    return [{str(column): text for column, text in row.items()} for row in table.to_dict("records")]


def _section(table: Table, scale: str, rows: Rows) -> str:
    ran = [row for row in rows if has_run(row)]
    measurable = [row for row in rows if row["seeds"] != REPORTED_ONLY]
    facts = [
        f"Data: {_distinct(ran, 'data')}",
        f"Scale: `{scale}`",
        f"Device: {_distinct(ran, 'device')}",
        f"Seconds a seed: search {_range(ran, 'search (s)')}, "
        f"training {_range(ran, 'training (s)')}",
    ]
    if len(ran) < len(measurable):
        facts.append(f"Not run: {len(measurable) - len(ran)} of {len(measurable)} rows")
    notes = [table.note] if table.note else []
    notes += [f"{', '.join(methods)}: {note}" for note, methods in _notes(rows).items()]
    lines = [f"{'. '.join(facts)}.", *(f"- {note}." for note in notes)]
    return "\n".join([f"**{table.title}**, scale `{scale}`\n", compact(rows), *lines])


def _notes(rows: Rows) -> dict[str, list[str]]:
    """List the methods that each note is on."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row["note"] != NONE:
            notes.setdefault(row["note"], []).append(row["method"])
    return notes


def _values(rows: Rows, column: str) -> list[str]:
    absent = (NONE, NOT_RUN, NOT_RECORDED)
    values = [value for row in rows for value in row[column].split(AND)]
    return [value for value in dict.fromkeys(values) if value not in absent]


def _distinct(rows: Rows, column: str) -> str:
    return "; ".join(_values(rows, column)) or NOT_RECORDED


def _range(rows: Rows, column: str) -> str:
    """Write the least and the greatest value of a column: "290 to 333"."""
    seconds = [int(value) for value in _values(rows, column) if value.isdecimal()]
    if not seconds:
        return NOT_RECORDED if any(row[column] == NOT_RECORDED for row in rows) else NONE
    return " to ".join(f"{value:,}" for value in sorted({min(seconds), max(seconds)}))
