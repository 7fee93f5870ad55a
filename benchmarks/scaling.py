"""Cost of one search step over channels, cells, batch and image size, with the machine's limits.

    python -m benchmarks.scaling --threads 2 --out benchmarks/results/mine-scaling.json

Each axis is swept around the setting of the other options. Pictures are written beside the JSON.
See `benchmarks/README.md` for what the limits mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import costs, measure
from benchmarks.measure import Setting
from benchmarks.systems import make_step, systems_for
from ssnas.pipeline.artifacts import write_json
from ssnas.report.style import ACCENT, DARK, MUTED, save, styled

AXES = {
    "channels": (8, 16, 32),
    "cells": (3, 5, 8),
    "batch": (16, 32, 64, 128),
    "size": (16, 32, 64),
}
NAMES = {"channels": "channels", "cells": "cells", "batch": "batch", "size": "image size"}
LINES = (
    ("median_ms", "measured", DARK, "o-"),
    ("arithmetic_ms", "arithmetic alone", ACCENT, "s--"),
    ("bandwidth_ms", "memory traffic alone", MUTED, "^:"),
)


def measure_point(setting: Setting, limits: Mapping[str, float], repeats: int) -> dict[str, float]:
    """Measure one search step of the fast system, beside the times that the limits alone allow.

    Without memory for the step, `out_of_memory` is the only figure.
    """
    make = partial(make_step, "search", systems_for(setting)["fast"], setting)
    peak = measure.in_fresh_process(measure.peak_megabytes, make, setting)
    if peak is None:
        return {"out_of_memory": True}
    seconds = measure.interleaved({"fast": make()}, torch.device(setting.device), repeats)
    gflop, moved = costs.step_operations(setting) / 1e9, costs.step_bytes(setting) / 1e9
    return {
        **measure.figures(seconds["fast"], setting.batch, peak),
        "gflop": gflop,
        "moved_gb": moved,
        "arithmetic_ms": 1e3 * gflop / limits["gflop_per_second"],
        "bandwidth_ms": 1e3 * moved / limits["gb_per_second"],
    }


def draw(report: Mapping[str, Any], png: Path, svg: Path) -> None:
    """Draw a panel for each axis from a report of `main`; both scales are logarithmic."""
    swept = report["results"]
    with styled():
        figure = Figure(figsize=(8.6, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, sharey=True, squeeze=False)
        for axes, (axis, points) in zip(grid.flat, swept.items(), strict=False):
            _draw_axis(axes, NAMES[axis], points)
        for axes in grid.flat[len(swept) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("milliseconds a step")
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=9.5)
        handles = grid[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(LINES))
        save(figure, png)
        save(figure, svg, kind="svg")


def _draw_axis(axes: Axes, name: str, points: dict[str, dict]) -> None:
    known = {int(value): row for value, row in points.items() if "median_ms" in row}
    for key, label, colour, line in LINES:
        values = [row[key] for row in known.values()]
        axes.plot(list(known), values, line, color=colour, label=label, markersize=4.5)
    axes.set(xscale="log", yscale="log", title=name)
    axes.set_xticks(list(known), [str(value) for value in known])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_tick_params(labelleft=True)
    axes.grid()


def _title(report: Mapping[str, Any]) -> str:
    environment, settings, limits = (report[key] for key in ("environment", "settings", "limits"))
    around = ", ".join(f"{NAMES[axis]} {settings[axis]}" for axis in AXES)
    return (
        f"One search step around {around}\n{environment['device']}, "
        f"threads {environment['threads']}, amp {settings['amp']}, graphs {settings['graphs']}: "
        f"{limits['gflop_per_second']:,.0f} GFLOP/s, {limits['gb_per_second']:,.0f} GB/s"
    )


def print_point(axis: str, value: int, row: Mapping[str, float]) -> None:
    """Print the figures of `measure_point`."""
    if "median_ms" not in row:
        print(f"{axis:10}{value:6}  out of memory", flush=True)
        return
    print(
        f"{axis:10}{value:6}{row['median_ms']:12.1f} ms{row['images_per_second']:12.1f} images/s"
        f"{row['peak_mb']:12.1f} MB{row['gflop']:10.2f} GFLOP"
        f"   limits {row['arithmetic_ms']:.1f} ms, {row['bandwidth_ms']:.1f} ms",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser("scaling", __doc__)
    measure.add_sizes(parser)
    for axis, values in AXES.items():
        parser.add_argument(f"--sweep-{axis}", type=int, nargs="*", default=values, metavar="N")
    parser.add_argument("--out", type=Path, required=True, help="JSON; PNG and SVG go beside it")
    args = parser.parse_args(argv)
    base = measure.setting_of(args)
    limits = {
        "gflop_per_second": costs.arithmetic_limit(base) / 1e9,
        "gb_per_second": costs.bandwidth_limit(base) / 1e9,
    }
    report = measure.report("scaling", base, args.repeats, limits=limits, results={})
    measured = cache(partial(measure_point, limits=limits, repeats=args.repeats))
    for axis in AXES:
        for value in getattr(args, f"sweep_{axis}"):
            row = measured(replace(base, **{axis: value}))
            report["results"].setdefault(axis, {})[str(value)] = row
            print_point(axis, value, row)
            write_json(args.out, report)
    draw(report, args.out.with_suffix(".png"), args.out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
