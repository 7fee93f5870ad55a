"""The tables that papers/tables.yaml declares, and checks that papers/figures.yaml shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssnas.config.decide import MULTI_LABEL_DECISIONS
from ssnas.config.load import read_yaml
from ssnas.config.schema import build
from ssnas.errors import InputError
from ssnas.report.papers.records import TESTED, Records, cross_validated
from ssnas.report.run import FIGURES

TABLES = Path("papers/tables.yaml")


@dataclass(frozen=True)
class Row:
    """One line of a paper's table.

    Attributes:
        system: the entries of papers/rows.yaml that it shows, None for a line that is only quoted.
        prefix: which keys of the system's figures it reads, the network's own if None.
        ours: the system it is compared with, if not the table's.
        reported: published figures, in per cent, as a number or in millions of parameters.
        source: where they are printed.
    """

    method: str
    system: str | None = None
    kind: str = dataclasses.field(default="rows", metadata={"choices": tuple(TESTED)})
    prefix: str | None = dataclasses.field(
        default=None, metadata={"choices": ("constant_", "linear_")}
    )
    ours: str | None = None
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Table:
    """One of the papers' tables; the first figure is the one that systems are compared by."""

    title: str
    ours: str | None = None
    note: str | None = None
    figures: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def cross_validated(self) -> bool:
        """True if the figures are over folds."""
        return any(cross_validated(row.kind) for row in self.rows if row.system)

    def reference(self, row: Row) -> Row | None:
        """Find the row that `row` is compared with, None if it is compared with none."""
        system = row.ours or self.ours
        rows = (row for row in self.rows if row.system == system and not row.prefix)
        return next(rows) if system else None

    def reference_name(self) -> str | None:
        """Name the reference in the column of differences; None if nothing is compared."""
        references = (self.reference(row) for row in self.rows if row.system)
        names = {reference.method for reference in references if reference}
        return None if not names else names.pop() if len(names) == 1 else "ours"


def read_tables(path: Path, records: Records) -> dict[str, Table]:
    """Read the tables that papers/tables.yaml declares, by key.

    Raises:
        InputError: naming an unknown key, figure, kind or system, and what is accepted.
    """
    document = read_yaml(path)
    return {key: _table(f"{path}: {key}", table, records) for key, table in document.items()}


def _table(where: str, declared: Any, records: Records) -> Table:
    declared = mapping(where, declared, "title")
    for key in ("figures", "rows"):
        value = declared.get(key)
        if not isinstance(value, list) or not value:
            raise InputError(f"{where}.{key}: found {value!r}; accepted is a list, not empty")
    figures, rows = tuple(declared.pop("figures")), declared.pop("rows")
    decisions, _, names = zip(*(key.rpartition(".") for key in figures), strict=True)
    choose(f"{where}.figures", names, FIGURES)
    choose(f"{where}.figures", filter(None, decisions), MULTI_LABEL_DECISIONS)
    rows = tuple(_row(f"{where}.rows.{i}", row, figures, records) for i, row in enumerate(rows))
    table: Table = dataclasses.replace(build(Table, where, declared), figures=figures, rows=rows)
    measured = [row for row in rows if row.system]
    references = [system for system in (table.ours, *(row.ours for row in rows)) if system]
    choose(f"{where}.ours", references, dict.fromkeys(r.system for r in measured if not r.prefix))
    if len({cross_validated(row.kind) for row in measured}) > 1:
        raise InputError(
            f"{where}.rows: found cross-validated kinds beside others; accepted are either "
            "only transfers and crossvalidations, or none of them"
        )
    return table


def _row(where: str, declared: Any, figures: Sequence[str], records: Records) -> Row:
    declared = mapping(where, declared, "method")
    reported = mapping(f"{where}.reported", declared.pop("reported", {}))
    choose(f"{where}.reported", reported, (*figures, "parameters"))
    for key, value in reported.items():
        if type(value) not in (int, float):
            raise InputError(f"{where}.reported.{key}: found {value!r}; accepted is a number")
    row: Row = dataclasses.replace(build(Row, where, declared), reported=reported)
    if row.system is not None:
        choose(f"{where}.system", [row.system], records.systems(row.kind))
    return row


def choose(where: str, values: Iterable[Any], choices: Iterable[str]) -> None:
    """Refuse values that are not among the choices."""
    choices = list(choices)
    for value in values:
        if value not in choices:
            raise InputError(f"{where}: found {value!r}; choose from {', '.join(choices)}")


def mapping(where: str, value: Any, *required: str) -> dict[str, Any]:
    """Copy a mapping; refuse anything else, and one that lacks a required key."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {value!r}; accepted is a mapping")
    for key in required:
        if key not in value:
            raise InputError(f"{where}: the key {key!r} is missing")
    return dict(value)
