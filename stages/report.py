"""Draw the pictures of the main run, write its page, and choose its headline figures."""

from pathlib import Path
from typing import Any

from ssnas.config.schema import Run
from ssnas.pipeline.artifacts import write_json
from ssnas.report.files import read_json
from ssnas.report.write import write_report
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
    page = write_report(numbers, REPORT)
    headlines: dict[str, Any] = _chosen(numbers / "evaluate.json", HEADLINES)
    if transferred := _chosen(numbers / "transfer.json", TRANSFERRED):
        headlines["transfer"] = transferred
    write_json(REPORT / "metrics.json", headlines)
    print(f"{page} is written; `python -m ssnas.report` prints the summary")


def _chosen(path: Path, keys: tuple[str, ...]) -> dict[str, float]:
    figures = read_json(path)
    return {key: figures[key] for key in keys if key in figures}


if __name__ == "__main__":
    main((), report)
