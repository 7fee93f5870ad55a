"""Everything that a report consists of, in one folder."""

from __future__ import annotations

from pathlib import Path

from ssnas.networks.genotype import Genotype
from ssnas.report.cells import draw_genotype
from ssnas.report.files import has_rows
from ssnas.report.page import write_html
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)


def write_report(numbers: Path, folder: Path) -> Path:
    """Write the page and the pictures of the run whose figures are in `numbers`.

    Returns:
        The page, `folder`/index.html.

    Raises:
        InputError: if a file that every run has is missing.
    """
    draw_pictures(numbers, folder / "pictures")
    page = folder / "index.html"
    write_html(numbers, folder / "pictures" / "genotype.svg", page)
    return page


def draw_pictures(numbers: Path, folder: Path) -> None:
    """Draw the files in `numbers`; a search or training of no epochs has no curves."""
    folder.mkdir(parents=True, exist_ok=True)
    genotype = Genotype.read(numbers / "genotype.json")
    draw_genotype(genotype, folder / "genotype.png", folder / "genotype.svg")
    class_counts_picture(numbers / "class_counts.csv", folder / "class_counts.png")
    per_class_picture(numbers / "per_class.csv", folder / "per_class.png")
    confusion_picture(numbers / "confusion.csv", folder / "confusion.png")
    curves = (numbers / "search.csv", numbers / "finetune.csv")
    search, finetune = (path if has_rows(path) else None for path in curves)
    if search or finetune:
        curves_picture(search, finetune, folder / "by_epoch.png")
    if has_rows(numbers / "alpha.csv"):
        alpha_picture(numbers / "alpha.csv", folder / "op_weights.png")
