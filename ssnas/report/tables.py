"""Tables as CSV for programs and as Markdown for people."""

from __future__ import annotations

import csv as csv_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_RUN = "not run"


def plus_minus(mean: float | None, std: float | None, n: int, decimals: int = 2) -> str:
    """`mean ± std (n)` over n runs; without the deviation for one run, "not run" for none."""
    if mean is None or n == 0:
        return NOT_RUN
    if std is None or n == 1:
        return f"{mean:.{decimals}f} ({n})"
    return f"{mean:.{decimals}f} ± {std:.{decimals}f} ({n})"


def write_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    csv: Path,
    markdown: Path,
    decimals: int = 2,
) -> None:
    """Write the same cells to a CSV and to a Markdown file.

    A cell that is None or that its row lacks reads "not run"; floats get `decimals` decimals.
    In Markdown, columns of numbers are set flush right.

    Raises:
        KeyError: if a row has a key that is no column.
    """
    for row in rows:
        if unknown := sorted(row.keys() - set(columns)):
            raise KeyError(f"row has {unknown}, which is not among the columns {list(columns)}")
    cells = [[_cell(row.get(column), decimals) for column in columns] for row in rows]
    for path in (csv, markdown):
        path.parent.mkdir(parents=True, exist_ok=True)
    with csv.open("w", newline="", encoding="utf-8") as file:
        csv_module.writer(file, lineterminator="\n").writerows([columns, *cells])
    numeric = [
        all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns
    ]
    markdown.write_text(_markdown(columns, cells, numeric), encoding="utf-8")


def _cell(value: Any, decimals: int) -> str:
    if value is None:
        return NOT_RUN
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def _markdown(columns: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> str:
    lines = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (columns, *cells)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])]) + "\n"
