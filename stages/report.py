"""Draw the pictures of the main run, write its page, and choose its headline figures."""

from pathlib import Path
from typing import Any

from ssnas.config.schema import Run
from ssnas.networks.genotype import Genotype
from ssnas.pipeline.artifacts import write_json
from ssnas.report.cells import draw_genotype
from ssnas.report.files import has_rows, read_json
from ssnas.report.page import write_html
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from stages.cli import main

REPORT = Path("report")
# What `dvc metrics` and `dvc exp show` have a column for; evaluate.json has all figures.
HEADLINES = (
    "balanced_accuracy",
    "few_shot",
    "binary_accuracy",
    "macro_auc",
    "linear_balanced_accuracy",
    "linear_macro_auc",
)
TRANSFERRED = ("balanced_accuracy", "macro_auc")


def report(run: Run) -> None:
    """Write report/: the pictures, the page with all of them, and metrics.json."""
    numbers = Path("metrics", run.folders["rows"])
    draw_pictures(numbers, REPORT / "pictures")
    page = REPORT / "index.html"
    write_html(numbers, REPORT / "pictures" / "genotype.svg", page)
    headlines: dict[str, Any] = _chosen(numbers / "evaluate.json", HEADLINES)
    if transferred := _chosen(numbers / "transfer.json", TRANSFERRED):
        headlines["transfer"] = transferred
    write_json(REPORT / "metrics.json", headlines)
    print(f"{page} is written; `python -m ssnas.report` prints the summary")


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


def _chosen(path: Path, keys: tuple[str, ...]) -> dict[str, float]:
    figures = read_json(path)
    return {key: figures[key] for key in keys if key in figures}


if __name__ == "__main__":
    main((), report)
