"""Memory and time of a search step on large images, by each way of saving memory.

    python -m benchmarks.large --threads 2 --out benchmarks/results/mine-large.json

See `benchmarks/README.md` for what is measured and how.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import measure
from benchmarks.measure import Setting
from benchmarks.systems import System, make_step

IMAGENET = {"stem": "imagenet"}
PARTIAL = {"relaxation": "softmax", "partial": 4}
CHECKPOINT = {"checkpoint": True}
WAYS = {
    "imagenet stem": IMAGENET,
    "imagenet stem, checkpoint": IMAGENET | CHECKPOINT,
    "imagenet stem, partial 4": IMAGENET | PARTIAL,
    "all three": IMAGENET | CHECKPOINT | PARTIAL,
}
"""The keys of `search` that save memory. The stem for small images would need many times more."""


def seconds_per_step(make: partial, setting: Setting, repeats: int) -> float:
    """Median seconds of a step after the warm-up; call it in a fresh process."""
    measure.use_machine(setting.threads)
    steps = {"own": make()}
    return median(measure.interleaved(steps, torch.device(setting.device), repeats)["own"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    measure.add_arguments(parser)
    parser.set_defaults(size=224, repeats=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    report = measure.report("large", setting, args.repeats, results={})
    print(f"{'search step':28}{'peak MB':>12}{'seconds':>12}")
    for name, options in WAYS.items():
        system = System(amp=setting.amp, graphs=setting.graphs == "on")
        make = partial(make_step, "search", system, setting, **options)
        peak = measure.in_fresh_process(measure.peak_megabytes, make, setting)
        row = {"options": options, "peak_mb": peak, "seconds": None}
        if peak is not None:
            row["seconds"] = measure.in_fresh_process(seconds_per_step, make, setting, args.repeats)
        report["results"][name] = row
        shown = [f"{row[key]:.1f}" if row[key] else "none" for key in ("peak_mb", "seconds")]
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in shown), flush=True)
        if args.out:
            measure.write_json(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
