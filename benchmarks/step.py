"""Times one search step and one fine-tuning step against the same networks computed plainly.

    python -m benchmarks.step --what both --threads 2 --out benchmarks/results/mine.json

See `benchmarks/README.md` for what is measured and how.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.measure import Setting
from benchmarks.systems import STEPS, System, make_step, systems_for

TOLERANCE = {"off": 1e-3, "bf16": 5e-2}
"""Relative difference from the plain twin's losses that is allowed, by precision."""


def compare(what: str, peaks: dict[str, float | None], setting: Setting, repeats: int) -> dict:
    """Losses, times and memory of all systems on the step `what`.

    Args:
        peaks: peak memory by system; one that ran out of it is left out.
    """
    device = torch.device(setting.device)
    systems = {
        name: system for name, system in systems_for(setting).items() if peaks[name] is not None
    }
    steps = {name: make_step(what, system, setting) for name, system in systems.items()}
    losses = {name: [loss.item() for loss in step()] for name, step in steps.items()}
    seconds = measure.interleaved(steps, device, repeats)
    found = {
        name: measure.figures(times, setting.batch, peaks[name]) for name, times in seconds.items()
    }
    if setting.on_cuda:
        for name, step in steps.items():
            found[name] |= measure.kernel_figures(step, device, found[name]["median_ms"])
    return {
        "losses": losses,
        "losses_agree": _agree(losses, systems),
        "out_of_memory": [name for name in peaks if name not in systems],
        **found,
        "ratio": _ratio(found),
    }


def _agree(losses: dict[str, list[float]], systems: dict[str, System]) -> bool:
    """Whether every system has the losses of the plain one, or of the fast one without it."""
    reference = losses.get("plain") or losses.get("fast", [])
    return all(
        math.isclose(own, expected, rel_tol=TOLERANCE[systems[name].amp])
        for name, values in losses.items()
        for own, expected in zip(values, reference, strict=True)
    )


def _ratio(found: dict[str, dict]) -> dict[str, float]:
    """How many times faster the fast system is than the plain one."""
    if not {"fast", "plain"} <= found.keys():
        return {}
    return {key: found["plain"][key] / found["fast"][key] for key in ("median_ms", "min_ms")}


def print_table(what: str, result: dict) -> None:
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
    """Exit status 1 if the systems' losses differ: then the times compare nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--what", choices=[*STEPS, "both"], default="both")
    measure.add_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    whats = list(STEPS) if args.what == "both" else [args.what]
    report = measure.report("step", setting, args.repeats)
    # Memory first, while this process is small: a new one may start from its size.
    peaks = {
        what: {
            name: measure.in_fresh_process(
                measure.peak_megabytes, partial(make_step, what, system, setting), setting
            )
            for name, system in systems_for(setting).items()
        }
        for what in whats
    }
    report["results"] = {}
    for what in whats:
        report["results"][what] = compare(what, peaks[what], setting, args.repeats)
        print_table(what, report["results"][what])
    if args.out:
        measure.write_json(args.out, report)
    return int(not all(result["losses_agree"] for result in report["results"].values()))


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
