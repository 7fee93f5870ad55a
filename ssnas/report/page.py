"""The report of one run as a single HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ssnas.errors import InputError
from ssnas.report.files import MAKE, has_rows
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from ssnas.report.run import Run, ops_in_words
from ssnas.report.template import template


def write_html(folder: Path, drawing: Path, out: Path) -> None:
    """Write the report of the run in `folder` to `out`: one file, no script, nothing fetched.

    Args:
        folder: the run's figures.
        drawing: the SVG of its cells.
        out: the page.

    Raises:
        InputError: if a file that every run has is missing; the message names the command that
            makes it.
    """
    run = Run.read(folder)
    if not drawing.is_file():
        raise InputError(f"{drawing}: no such file; {MAKE}")
    page = template("run.html", autoescape=True, ops_in_words=ops_in_words).render(
        run=run,
        drawing=_data_uri("image/svg+xml", drawing.read_bytes()),
        pictures={title: _drawn(draw) for title, draw in _pictures(folder).items()},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.strip() + "\n", encoding="utf-8")


def _pictures(folder: Path) -> dict[str, Callable[[BinaryIO], None]]:
    """Return by title the pictures whose numbers the folder has."""
    counts, confusion = folder / "class_counts.csv", folder / "confusion.csv"
    search, finetune, alpha = (folder / f"{name}.csv" for name in ("search", "finetune", "alpha"))
    curves = (search if has_rows(search) else None, finetune if has_rows(finetune) else None)
    pictures = {
        "Images per class": partial(class_counts_picture, counts) if counts.exists() else None,
        "Recall or AUC by frequency": partial(per_class_picture, folder / "per_class.csv"),
        "Confusion": partial(confusion_picture, confusion) if confusion.exists() else None,
        "Curves": partial(curves_picture, *curves) if any(curves) else None,
        "Architecture weights": partial(alpha_picture, alpha) if has_rows(alpha) else None,
    }
    return {title: draw for title, draw in pictures.items() if draw}


def _drawn(draw: Callable[[BinaryIO], None]) -> str:
    buffer = io.BytesIO()
    draw(buffer)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
