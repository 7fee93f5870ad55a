"""What papers/tables.yaml declares, and the checks that papers/figures.yaml shares with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        reported: published figures, in per cent, as a number or in millions of parameters; None
            for one that is printed but not at hand.
        source: where they are printed.
    """

    method: str
    system: str | None = None
    kind: str = dataclasses.field(default="rows", metadata={"choices": tuple(TESTED)})
    prefix: str | None = dataclasses.field(
        default=None, metadata={"choices": ("constant_", "linear_")}
    )
    ours: str | None = None
    reported: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
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
        return any(cross_validated(row.kind) for row in self.rows if row.system)

    def reports(self, key: str) -> bool:
        return any(key in row.reported for row in self.rows)

    def reference(self, row: Row) -> Row | None:
        """The row that `row` is compared with, None if it is compared with none."""
        system = row.ours or self.ours
        own = (row for row in self.rows if row.system == system and not row.prefix)
        return next(own) if system else None

    def reference_name(self) -> str | None:
        """How the column of differences names it; None if nothing is compared."""
        names = {own.method for row in self.rows if row.system and (own := self.reference(row))}
        return None if not names else names.pop() if len(names) == 1 else "ours"


def read_tables(path: Path, records: Records) -> dict[str, Table]:
    """The tables that papers/tables.yaml declares, by key.

    Raises:
        InputError: naming an unknown key, figure, kind or system, and what is accepted.
    """
    declared = read_yaml(path).items()
    return {key: _table(f"{path}: {key}", given, records) for key, given in declared}


def _table(where: str, given: Any, records: Records) -> Table:
    given = dict(mapping(where, given))
    require(where, given, "title")
    figures, rows = (
        _sequence(f"{where}.{part}", given.pop(part, None)) for part in ("figures", "rows")
    )
    choose(f"{where}.figures", figures, FIGURES)
    rows = [_row(f"{where}.rows.{i}", row, figures, records) for i, row in enumerate(rows)]
    table = dataclasses.replace(
        build(Table, where, given), figures=tuple(figures), rows=tuple(rows)
    )
    measured = [row for row in rows if row.system]
    ours = [name for name in (table.ours, *(row.ours for row in rows)) if name]
    choose(f"{where}.ours", ours, dict.fromkeys(r.system for r in measured if not r.prefix))
    if len({cross_validated(row.kind) for row in measured}) > 1:
        raise InputError(
            f"{where}.rows: found cross-validated kinds beside others; accepted are either "
            "only transfers and crossvalidations, or none of them"
        )
    return table


def _row(where: str, given: Any, figures: Sequence[str], records: Records) -> Row:
    given = dict(mapping(where, given))
    require(where, given, "method")
    reported = mapping(f"{where}.reported", given.pop("reported", {}))
    choose(f"{where}.reported", reported, (*figures, "parameters"))
    for key, value in reported.items():
        if value is not None and type(value) not in (int, float):
            raise InputError(
                f"{where}.reported.{key}: found {value!r}; accepted is a number or null"
            )
    row = build(Row, where, given)
    if row.system is not None:
        choose(f"{where}.system", [row.system], records.systems(row.kind))
    return dataclasses.replace(row, reported=reported)


def choose(where: str, found: Iterable[Any], choices: Iterable[str]) -> None:
    """Refuse what is not among the choices."""
    choices = list(choices)
    for value in found:
        if value not in choices:
            raise InputError(f"{where}: found {value!r}; choose from {', '.join(choices)}")


def require(where: str, given: Mapping[str, Any], *keys: str) -> None:
    """Refuse a mapping that lacks one of the keys."""
    for key in keys:
        if key not in given:
            raise InputError(f"{where}: the key {key!r} is missing")


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    """`value`, refused unless it is a mapping."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {value!r}; accepted is a mapping")
    return value


def _sequence(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: found {value!r}; accepted is a list, not empty")
    return value
