"""Times one search step and one fine-tuning step against the same networks computed plainly.

    python -m benchmarks.step --what both --threads 2 --out benchmarks/results/mine.json

See `benchmarks/README.md` for what is measured and how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Setting
from benchmarks.systems import STEPS, System, make_step, systems_for
from ssnas.pipeline.artifacts import write_json

TOLERANCE = {"off": 1e-3, "bf16": 5e-2}
"""Relative difference from the plain twin's losses that is allowed, by precision."""


def peaks_of(what: str, setting: Setting) -> dict[str, float | None]:
    """Measure the peak memory of every system on the step `what`."""
    return {
        name: measure.in_fresh_process(
            measure.peak_megabytes, partial(make_step, what, system, setting), setting
        )
        for name, system in systems_for(setting).items()
    }


def compare(
    what: str, peaks: Mapping[str, float | None], setting: Setting, repeats: int
) -> dict[str, Any]:
    """Measure the losses and times of all systems on the step `what`.

    Args:
        peaks: peak memory by system; one that ran out of it is left out.
    """
    device = torch.device(setting.device)
    fitting = {name: peak for name, peak in peaks.items() if peak is not None}
    systems = {name: system for name, system in systems_for(setting).items() if name in fitting}
    steps = {name: make_step(what, system, setting) for name, system in systems.items()}
    losses = {name: [loss.item() for loss in step()] for name, step in steps.items()}
    figures = {
        name: measure.figures(seconds, setting.batch, fitting[name])
        for name, seconds in measure.interleaved(steps, device, repeats).items()
    }
    if setting.on_cuda:
        for name, step in steps.items():
            figures[name] |= measure.kernel_figures(step, device, figures[name]["median_ms"])
    return {
        "losses": losses,
        "losses_agree": _agree(losses, systems),
        "out_of_memory": [name for name in peaks if name not in systems],
        **figures,
        "ratio": _ratio(figures),
    }


def _agree(losses: Mapping[str, list[float]], systems: Mapping[str, System]) -> bool:
    """Check the losses against those of the plain system, or of the fast one without it."""
    reference = losses.get("plain") or losses.get("fast", [])
    return all(
        math.isclose(loss, expected, rel_tol=TOLERANCE[systems[name].amp])
        for name, values in losses.items()
        for loss, expected in zip(values, reference, strict=True)
    )


def _ratio(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Divide the plain system's times by the fast one's."""
    if not {"fast", "plain"} <= figures.keys():
        return {}
    return {key: figures["plain"][key] / figures["fast"][key] for key in ("median_ms", "min_ms")}


def print_table(what: str, result: Mapping[str, Any]) -> None:
    """Print the result of `compare`."""
    losses = "; ".join(
        f"{name} {', '.join(f'{loss:.6g}' for loss in values)}"
        for name, values in result["losses"].items()
    )
    verdict = "agree" if result["losses_agree"] else "DISAGREE"
    print(f"\n{what}: losses of the first step {verdict} ({losses})")
    heads = ("median ms", "min ms", "images/s", "peak MB", "ratio", "kernels", "in kernels")
    print(f"{'system':28}" + "".join(f"{head:>12}" for head in heads))
    plain = result.get("plain")
    for name in result["losses"]:
        row = result[name]
        cells = [
            *(f"{row[key]:.1f}" for key in ("median_ms", "min_ms", "images_per_second", "peak_mb")),
            f"{plain['median_ms'] / row['median_ms']:.2f}" if plain else "",
            f"{row['kernels']:.0f}" if "kernels" in row else "",
            f"{row['kernel_share']:.0%}" if "kernel_share" in row else "",
        ]
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in cells))
    for name in result["out_of_memory"]:
        print(f"{name:28}out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if the systems' losses differ: then the times compare nothing."""
    parser = measure.parser("step", __doc__)
    parser.add_argument("--what", choices=[*STEPS, "both"], default="both")
    measure.add_sizes(parser)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    whats = list(STEPS) if args.what == "both" else [args.what]
    report = measure.report("step", setting, args.repeats, results={})
    # Memory first, while this process is small: a new one may start from its size.
    peaks = {what: peaks_of(what, setting) for what in whats}
    for what in whats:
        report["results"][what] = compare(what, peaks[what], setting, args.repeats)
        print_table(what, report["results"][what])
    if args.out:
        write_json(args.out, report)
    return int(not all(result["losses_agree"] for result in report["results"].values()))


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
