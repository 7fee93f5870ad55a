"""One look for every picture: palette, type, and byte-for-byte reproducible files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator

INK, MUTED, FAINT, PAPER = "#1f2933", "#5b6472", "#d9dee5", "#ffffff"
LIGHT, DARK, ACCENT = "#a9cfe8", "#0072b2", "#c65102"  # Okabe and Ito's blue and vermilion

# Okabe and Ito's colour-blind safe hues, darkened until white text on them is readable.
KINDS = {
    "separable convolution": "#0072b2",
    "dilated convolution": "#007a5a",
    "pooling": "#b85000",
    "skip connection": "#8a4a78",
    "none": "#8b929c",
    "other operation": "#5a5f2c",
}
# op: (kind, line style). The style tells apart the two ops that share a kind's colour.
_OPS = {
    "none": ("none", "-"),
    "max_pool_3x3": ("pooling", "-"),
    "avg_pool_3x3": ("pooling", "--"),
    "skip_connect": ("skip connection", "-"),
    "sep_conv_3x3": ("separable convolution", "-"),
    "sep_conv_5x5": ("separable convolution", "--"),
    "dil_conv_3x3": ("dilated convolution", "-"),
    "dil_conv_5x5": ("dilated convolution", "--"),
}
_FAMILIES = {"sep_conv": "separable convolution", "dil_conv": "dilated convolution"}

_FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)

_RC = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "ssnas",
}


def op_style(op: str) -> tuple[str, str]:
    """Return the kind and the line style of an op; an op without an entry has those of its name.

    >>> op_style("sep_conv_5x5"), op_style("sep_conv_7x7"), op_style("attention")
    (('separable convolution', '--'), ('separable convolution', ':'), ('other operation', ':'))
    """
    if op in _OPS:
        return _OPS[op]
    kinds = [kind for family, kind in _FAMILIES.items() if op.startswith(family)]
    return (kinds or ["other operation"])[0], ":"


def op_colour(op: str) -> str:
    """Return the colour of an op's kind.

    >>> op_colour("skip_connect")
    '#8a4a78'
    """
    return KINDS[op_style(op)[0]]


def state_name(state: int) -> str:
    """Name a cell's state: cₖ₋₂, cₖ₋₁ for the inputs, then 0, 1, 2, 3 for the nodes.

    >>> state_name(0), state_name(2)
    ('cₖ₋₂', '0')
    """
    return ("cₖ₋₂", "cₖ₋₁")[state] if state < 2 else str(state - 2)


def shorten(name: str, limit: int = 18) -> str:
    """Cut `name` to at most `limit` characters, with an ellipsis, for a picture.

    >>> shorten("a very long class name", 10)
    'a very lo…'
    """
    return literal(name if len(name) <= limit else name[: limit - 1].rstrip() + "…")


def drawable(names: Sequence[str]) -> list[str]:
    """Give the names as a picture can show them.

    A name with characters that no font here has becomes "class k"; the page's table has it written
    out, in the same order.

    >>> drawable(["cat", "\U000f0000"])
    ['cat', 'class 1']
    """
    known = _characters()
    return [
        name if known.issuperset(map(ord, name)) else f"class {k}" for k, name in enumerate(names)
    ]


@lru_cache
def _fallback_fonts() -> tuple[str, ...]:
    """Name the installed fonts that have many scripts, for names that DejaVu cannot write."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _FALLBACKS if name in installed)


@lru_cache
def _characters() -> frozenset[int]:
    known: set[int] = set()
    for family in ("DejaVu Sans", *_fallback_fonts()):
        font = font_manager.get_font(font_manager.findfont(family))
        known.update(font.get_charmap())
    return frozenset(known)


def literal(text: str) -> str:
    """Escape the dollar signs of `text`: matplotlib reads two of them as mathematics."""
    return text.replace("$", r"\$")


def integer_ticks(axis: Axis, most: int | str = "auto") -> None:
    """Put the ticks of an axis on whole numbers, at most so many."""
    locator = AutoLocator()
    locator.set_params(integer=True, nbins=most)
    axis.set_major_locator(locator)


@contextmanager
def styled() -> Iterator[None]:
    """Draw within the context in our style over matplotlib's defaults, not the user's."""
    look: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_RC}
    look.pop("backend")  # not ours to change
    look["font.sans-serif"] = ["DejaVu Sans", *_fallback_fonts()]
    with matplotlib.rc_context(look):
        yield


def save(figure: Figure, target: Path | BinaryIO, kind: str = "png", dpi: int = 160) -> None:
    """Write `figure` as "png" or "svg" without a date or version: equal input gives equal bytes."""
    blank = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format=kind, dpi=dpi, metadata=blank, facecolor=PAPER)
