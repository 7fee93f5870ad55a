"""Pictures of one run, each from the CSV file that holds its numbers.

Every function writes PNG to a path or to an open binary file; equal numbers give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ssnas.report.files import read_csv
from ssnas.report.style import (
    ACCENT,
    DARK,
    FAINT,
    INK,
    LIGHT,
    MUTED,
    drawable,
    integer_ticks,
    op_colour,
    op_style,
    save,
    shorten,
    state_name,
    styled,
)

Target = Path | BinaryIO
NUMBERED = 20  # more classes than this are drawn without a number each
_MOST_TICKS = 40
_COLUMNS = 7  # panels beside each other for the op weights


def class_counts_picture(csv: Path, png: Target) -> None:
    """Draw the images per class before the long-tailed sampling (light) and after it (dark)."""
    table = read_csv(csv, "name", "before", "train")
    with styled():
        figure, axes = _wide_figure(len(table))
        places = np.arange(len(table))
        axes.bar(places, table["before"], width=0.86, color=LIGHT, label="before")
        axes.bar(places, table["train"], width=0.56, color=DARK, label="training set")
        if len(table) <= NUMBERED:
            for place, before, after in zip(places, table["before"], table["train"], strict=True):
                axes.annotate(
                    f"{after:,}" if before == after else f"{before:,} → {after:,}",
                    (place, max(before, after)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7 if len(table) <= 12 else 6,
                    color=MUTED,
                )
        axes.set(ylabel="images", title="Images per class, before and in the training set")
        axes.grid(axis="y")
        _name_classes(axes, drawable(list(table["name"])))
        figure.legend(loc="outside upper right", ncols=2)
        save(figure, png)


def confusion_picture(csv: Path, png: Target) -> None:
    """Draw the confusion matrix: colours are shares of the actual class, numbers test images."""
    table = read_csv(csv, "actual", "predicted", "count")
    names = list(dict.fromkeys([*table["actual"], *table["predicted"]]))
    matrix = table.groupby(["actual", "predicted"])["count"].sum().unstack(fill_value=0)
    counts = matrix.reindex(index=names, columns=names, fill_value=0).to_numpy(dtype=int)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.6 + 0.42 * len(names), 4.6, 8.4))
    with styled():
        figure = Figure(figsize=(side + 0.9, side), layout="constrained")
        axes = figure.add_subplot()
        ramp = LinearSegmentedColormap.from_list("ramp", ["#ffffff", LIGHT, DARK, "#012a4a"])
        image = axes.imshow(shares, cmap=ramp, vmin=0, vmax=1)
        if len(names) <= NUMBERED:
            size = 8.5 if len(names) <= 12 else 6.5
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if shares[row, column] > 0.5 else INK if count else FAINT
                text = axes.text(column, row, str(count) if count else "·", fontsize=size)
                text.set(ha="center", va="center", color=colour)
        axes.set(xlabel="predicted class", ylabel="actual class", title="Confusion of test images")
        names = drawable(names)
        _name_classes(axes, names)
        ticks = axes.get_xticks()
        axes.set_yticks(ticks, [shorten(names[int(tick)]) for tick in ticks], fontsize=_size(names))
        bar = figure.colorbar(image, label="share of the actual class", shrink=0.8)
        bar.outline.set_visible(False)
        save(figure, png)


def per_class_picture(csv: Path, png: Target) -> None:
    """Draw recall (or AUC) of each class as bars, from the most to the least frequent in training.

    The number of training images is the line, on the logarithmic axis at the right.
    """
    figure_name = "auc" if "auc" in read_csv(csv) else "recall"
    table = read_csv(csv, "name", "train_images", figure_name)
    table["shown"] = drawable(list(table["name"]))
    table = table.sort_values("train_images", ascending=False, kind="stable")
    values = table[figure_name]
    label, kind = {"auc": ("AUC", "label"), "recall": ("recall", "class")}[figure_name]
    with styled():
        figure, axes = _wide_figure(len(table))
        axes.bar(np.arange(len(table)), values.fillna(0), width=0.72, color=LIGHT)
        if len(table) <= NUMBERED:
            for place, value in enumerate(values):
                text = "none" if pd.isna(value) else f"{value:.2f}"
                axes.text(place, 0.015, text, ha="center", fontsize=8, color=INK)
        if figure_name == "auc":
            axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
            axes.text(len(table) - 0.5, 0.505, "chance", ha="right", fontsize=7.5, color=MUTED)
        axes.set(ylim=(0, 1.02), ylabel=f"{label} on the test images")
        axes.set_title(f"{label[0].upper()}{label[1:]} of each {kind}, most frequent first")
        axes.grid(axis="y")
        _name_classes(axes, list(table["shown"]))
        _draw_counts(axes.twinx(), table["train_images"].clip(lower=1))
        save(figure, png)


def _draw_counts(axes: Axes, counts: pd.Series) -> None:
    axes.plot(range(len(counts)), counts, "o-", color=ACCENT, markersize=3.5)
    axes.set_yscale("log")
    low, high = counts.min(), max(counts.max(), 2 * counts.min())
    # The line stays above the numbers at the feet of the bars.
    axes.set_ylim(low * (low / high) ** 0.2, high * (high / low) ** 0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("training images (line, logarithmic)", color=ACCENT)
    axes.tick_params(colors=ACCENT)


# (title, columns, unit)
_SEARCH_PANELS = (
    ("loss of the weights", ("loss_weights",), "loss"),
    ("loss of the architecture", ("loss_alpha",), "loss"),
    ("zero-one loss", ("loss_zero_one",), "loss"),
    ("decided op weights", ("decided",), "decided"),
    ("skip connections", ("skip_normal", "skip_reduce"), "edges"),
    ("nearest-neighbour accuracy", ("knn_accuracy",), "accuracy"),
)
_FINETUNE_PANELS = (
    ("loss", ("loss",), "loss"),
    ("validation accuracy", ("val_accuracy", "val_balanced_accuracy"), "accuracy"),
    ("validation figures", ("val_binary_accuracy", "val_macro_auc"), "figure"),
    ("learning rate", ("learning_rate",), "learning rate"),
)


def curves_picture(search_csv: Path | None, finetune_csv: Path | None, png: Target) -> None:
    """Draw the curves of search and fine-tuning, one small panel per quantity over epochs.

    None leaves out that half; a column that a file lacks leaves out its panel.
    """
    panels = []
    for stage, csv, wanted in (
        ("Search", search_csv, _SEARCH_PANELS),
        ("Fine-tuning", finetune_csv, _FINETUNE_PANELS),
    ):
        table = pd.DataFrame() if csv is None else read_csv(csv, "epoch").set_index("epoch")
        for title, keys, unit in wanted:
            curves = [table[key].dropna() for key in keys if key in table]
            if curves := [curve for curve in curves if len(curve)]:
                panels.append((f"{stage}: {title}", curves, unit))
    columns = 3
    rows = max(1, -(-len(panels) // columns))
    with styled():
        figure = Figure(figsize=(10, 2.35 * rows), layout="constrained")
        for place, (title, curves, unit) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            for curve, colour, line in zip(curves, (DARK, ACCENT), ("-", "--"), strict=False):
                label = str(curve.name).removeprefix("val_").removeprefix("skip_")
                label = label.replace("_", " ").replace("auc", "AUC")
                mark = "o" if len(curve) < 3 else None
                axes.plot(curve.index, curve, line, color=colour, label=label, marker=mark)
            axes.set_title(title, fontsize=9.5)
            axes.set(xlabel="epoch", ylabel=unit)
            integer_ticks(axes.xaxis)
            axes.grid()
            if len(curves) > 1:
                axes.legend(fontsize=8)
        save(figure, png)


def alpha_picture(alpha_csv: Path, png: Target) -> None:
    """Draw the op weights σ(α) (or softmax) over epochs, one small panel per edge of both cells."""
    table = read_csv(alpha_csv, "epoch", "cell", "edge", "op", "weight")
    cells = [(str(cell), part) for cell, part in table.groupby("cell")]
    rows = [-(-part["edge"].nunique() // _COLUMNS) for _, part in cells]
    inches = [*(1.35 * count + 0.95 for count in rows), 0.3]
    with styled():
        figure = Figure(figsize=(11, sum(inches)))
        *blocks, foot = figure.subfigures(len(inches), 1, squeeze=False, height_ratios=inches)[:, 0]
        for block, (cell, part), count, height in zip(blocks, cells, rows, inches, strict=False):
            # Fixed margins: matplotlib's automatic layout takes seconds for so many panels.
            margins = {
                "left": 0.05,
                "right": 0.99,
                "top": 1 - 0.55 / height,
                "bottom": 0.45 / height,
            }
            grid = block.subplots(count, _COLUMNS, sharex=True, sharey=True, squeeze=False)
            block.subplots_adjust(**margins, hspace=0.36, wspace=0.1)
            title = {"normal": "Normal cell", "reduce": "Reduction cell"}.get(cell, cell)
            block.text(0.01, 1 - 0.24 / height, f"{title}: op weights", weight="bold", size=11)
            _draw_edges(grid, part)
        handles = [
            Line2D([], [], color=op_colour(op), linestyle=op_style(op)[1], label=op)  # type: ignore[arg-type]
            for op in table["op"].unique()
        ]
        foot.legend(handles=handles, loc="lower center", ncols=8, fontsize=8)
        save(figure, png)


def _draw_edges(grid: np.ndarray, table: pd.DataFrame) -> None:
    for axes in grid.flat[table["edge"].nunique() :]:
        axes.set_axis_off()
    for axes, (edge, part) in zip(grid.flat, table.groupby("edge", sort=False), strict=False):
        source, target = (state_name(int(state)) for state in str(edge).split("->"))
        for op, weights in part.groupby("op", sort=False):
            colour, (_, line) = op_colour(str(op)), op_style(str(op))
            axes.plot(weights["epoch"], weights["weight"], line, color=colour, linewidth=1.1)
        axes.set_title(f"{source} → {target}", fontsize=8.5, loc="center", weight="normal", pad=3)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(labelsize=7)
        integer_ticks(axes.xaxis, most=4)
        axes.grid()
    for axes in grid[-1]:
        axes.set_xlabel("epoch", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("weight", fontsize=8)


def _wide_figure(bars: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(float(np.clip(3 + 0.55 * bars, 6.5, 11)), 4), layout="constrained")
    return figure, figure.add_subplot()


def _size(names: Sequence[str]) -> float:
    return 8.5 if len(names) <= NUMBERED else 6.5


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Write class names along the x axis; of very many classes every second, third, ... one."""
    ticks = range(0, len(names), -(-len(names) // _MOST_TICKS))
    labels = [shorten(names[tick]) for tick in ticks]
    slot = axes.figure.get_figwidth() * 72 * 0.8 / len(ticks)  # type: ignore[union-attr]
    turned: dict[str, Any] = {}
    if max(map(len, labels)) * 0.62 * _size(names) >= slot - 4:
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if slot < 1.5 * _size(names):
            turned |= {"rotation": 90, "va": "center"}
    axes.set_xticks(ticks, labels, fontsize=_size(names), **turned)
    axes.set_xlim(-0.6, len(names) - 0.4)
