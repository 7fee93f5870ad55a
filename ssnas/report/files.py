"""Readers of a run's files, whose errors say how to make a missing or damaged one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd

from ssnas.errors import InputError

MAKE = "make it with `dvc repro`"
_TEXTS = ("name", "actual", "predicted", "op", "edge", "cell")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        InputError: if the file is missing, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; {MAKE}, or wait: a run may be under way"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {MAKE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        InputError: if the file is missing, or holds no JSON object.
    """
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); {MAKE}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}, not an object; {MAKE}")
    return document


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """Read a CSV file that has at least `columns` and one row.

    Class names stay text, also "007" and "NA"; in the columns of numbers an empty cell is NaN.

    Raises:
        InputError: if the file is missing or empty, or lacks a column.
    """
    text = read_text(path)
    try:
        header = pd.read_csv(io.StringIO(text), nrows=0).columns
        table = pd.read_csv(
            io.StringIO(text),
            dtype=dict.fromkeys(_TEXTS, str),
            keep_default_na=False,
            na_values={column: ["", "nan", "NaN"] for column in header if column not in _TEXTS},
        )
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); {MAKE}") from error
    if missing := [column for column in columns if column not in table]:
        raise InputError(
            f"{path}: lacks column {missing[0]!r}; found {', '.join(table.columns)}; {MAKE}"
        )
    if table.empty:
        raise InputError(f"{path}: holds no rows; {MAKE}")
    return table


def has_rows(path: Path) -> bool:
    """Tell whether a CSV file is there and holds more than its header.

    A search or training of no epochs leaves a file without rows.
    """
    return path.is_file() and len(path.read_text(encoding="utf-8").split("\n", 2)) > 2
