"""What a person looks at: cell drawings, pictures, tables, the closing summary, the HTML report."""

from ssnas.report.compare import Comparison, paired
from ssnas.report.declared import read_tables
from ssnas.report.drawing import draw_genotype
from ssnas.report.figures import PaperFigure, read_figures, write_figure
from ssnas.report.pages import write_html
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from ssnas.report.records import Records
from ssnas.report.tables import plus_minus, write_table, write_tables
from ssnas.report.text import summary

__all__ = [
    "Comparison",
    "PaperFigure",
    "Records",
    "alpha_picture",
    "class_counts_picture",
    "confusion_picture",
    "curves_picture",
    "draw_genotype",
    "paired",
    "per_class_picture",
    "plus_minus",
    "read_figures",
    "read_tables",
    "summary",
    "write_figure",
    "write_html",
    "write_table",
    "write_tables",
]
