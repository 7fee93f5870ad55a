"""Reading the files of one run folder, with an error that says how to make a missing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ssnas.errors import InputError

MAKE = "make it with `dvc repro`"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: if the file is missing, or holds no JSON object.
    """
    try:
        document = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); {MAKE}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}, not an object; {MAKE}")
    return document


def read_csv(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV file that has at least `columns` and one row.

    Class names stay text, also "007" and "NA".

    Raises:
        InputError: if the file is missing or empty, or lacks a column.
    """
    _text(path)
    texts = ("name", "actual", "predicted", "op", "edge", "cell")
    keep = {column: (lambda text: text) for column in texts}
    try:
        table = pd.read_csv(path, converters=keep)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); {MAKE}") from error
    if missing := [column for column in columns if column not in table]:
        found = ", ".join(table.columns)
        raise InputError(f"{path}: lacks column {missing[0]!r}; found {found}; {MAKE}")
    if table.empty:
        raise InputError(f"{path}: holds no rows; {MAKE}")
    return table


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {MAKE}")
    return path.read_text(encoding="utf-8")
