"""The few lines with which a run ends in the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pandas as pd

from ssnas.report.run import Run, ops_in_words

_WIDTH, _LABEL = 88, 14
_HEADLINES = {
    "recall": ("error_rate", "balanced_accuracy"),
    "auc": ("binary_accuracy", "macro_auc"),
}
_REPORT = Path("report")
_ASK = "none; to another data set with `dvc exp run -S transfer.dataset=faces`"


def summary(folder: Path, report: Path = _REPORT, title: str = "") -> str:
    """Sum up the run in `folder` in at most 25 lines of at most 88 columns.

    Args:
        report: the folder of its page and pictures.
        title: of the run; that of the folder by default.

    Raises:
        InputError: if a file that every run has is missing; the message names the command that
            makes it.
    """
    run = Run.read(folder)
    by_dvc = (folder / "transfer.json").exists()
    pictures = ", ".join(sorted(path.name for path in report.glob("pictures/*.png")))
    lines = [
        f"Result of {title or folder.name}",
        *_field("data", f"{run.dataset} · {run.sampling()}", 2),
        *_field("origin", run.origin(), 2),
        *_field("images", run.split_sizes(), 1),
        *_field("warnings", "; ".join(run.warnings), 3),
        *_field("normal cell", ops_in_words(run.genotype.normal), 2),
        *_field("reduction cell", ops_in_words(run.genotype.reduce), 2),
        *_field("network", run.network(), 2),
        *_field("search", run.searched(), 1),
        f"{'test images':<26}{'ours':>12}{'linear':>12}{'constant':>12}  95 % interval of ours",
        *(
            f"  {title:<24}{ours:>12}{linear:>12}{constant:>12}  {run.interval(key)}".rstrip()
            for key in _HEADLINES[run.class_figure]
            for title, ours, linear, constant in [run.figure_row(key)]
        ),
        *_field("noise", run.noise(), 1),
        *_field("decision", run.decide, 1),
        *_field({"auc": "AUC", "recall": "recall"}[run.class_figure], _per_class(run), 3),
        *(_field("transfer", run.transferred() if run.transfer else _ASK, 2) if by_dvc else []),
        *_field("run", run.conditions(), 2),
        *_field("report", str(report / "index.html"), 2),
        *_field("pictures", pictures, 1),
    ]
    return "\n".join(lines)


def _field(label: str, text: str, most_lines: int) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=f"{label:<{_LABEL}}  ",
        subsequent_indent=" " * (_LABEL + 2),
        max_lines=most_lines,
        placeholder=" …",
    )


def _per_class(run: Run) -> str:
    """List each class's figure, most frequent class first; the extremes of too many classes."""
    figure = run.class_figure
    table = run.per_class.dropna(subset=figure)
    table = table.sort_values("train_images", ascending=False, kind="stable")
    everything = ", ".join(_named(table, figure)) + " (most frequent first)"
    if len(_field("", everything, most_lines=4)) <= 3:
        return everything
    ranked = table.sort_values(figure, ascending=False, kind="stable")
    best, worst = (", ".join(_named(part, figure)) for part in (ranked.head(3), ranked.tail(3)))
    return f"median {ranked[figure].median():.2f}; highest {best}; lowest {worst}"


def _named(table: pd.DataFrame, figure: str) -> list[str]:
    return [
        f"{textwrap.shorten(name, 20, placeholder='…') or '?'} {value:.2f}"
        for name, value in zip(table["name"], table[figure], strict=True)
    ]
