"""What a person looks at: cell drawings, pictures, tables, the closing summary, the HTML report."""

from ssnas.report.drawing import draw_genotype
from ssnas.report.pages import write_html
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from ssnas.report.tables import plus_minus, write_table
from ssnas.report.text import summary

__all__ = [
    "alpha_picture",
    "class_counts_picture",
    "confusion_picture",
    "curves_picture",
    "draw_genotype",
    "per_class_picture",
    "plus_minus",
    "summary",
    "write_html",
    "write_table",
]
