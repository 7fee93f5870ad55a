"""The papers' figures from the systems that have run: a CSV, PNG and SVG by figure and scale."""

from pathlib import Path

from ssnas.report.papers.figures import read_figures, write_figure
from ssnas.report.papers.records import Records
from stages.cli import guarded

FIGURES, FOLDER = Path("papers/figures.yaml"), Path("papers/figures")


def figures() -> None:
    records = Records.read()
    for key, figure in read_figures(FIGURES, records).items():
        for scale in records.scales:
            write_figure(figure, scale, records, FOLDER / scale / key)


if __name__ == "__main__":
    guarded(figures)
