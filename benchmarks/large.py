"""Memory and time of a search step on large images, by each way of saving memory.

    python -m benchmarks.large --threads 2 --out benchmarks/results/mine-large.json

See `benchmarks/README.md` for what is measured and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Setting, Step
from benchmarks.systems import System, make_step
from ssnas.pipeline.artifacts import write_json

IMAGENET = {"stem": "imagenet"}
PARTIAL = {"relaxation": "softmax", "partial": 4}
CHECKPOINT = {"checkpoint": True}
WAYS: dict[str, dict[str, Any]] = {
    "imagenet stem": IMAGENET,
    "imagenet stem, checkpoint": IMAGENET | CHECKPOINT,
    "imagenet stem, partial 4": IMAGENET | PARTIAL,
    "all three": IMAGENET | CHECKPOINT | PARTIAL,
}
"""The keys of `search` that save memory. The stem for small images would need many times more."""


def seconds_per_step(make: Callable[[], Step], setting: Setting, repeats: int) -> float:
    """Time a step, as the median after the warm-up; call it in a fresh process."""
    measure.use_machine(setting.threads)
    seconds = measure.interleaved({"step": make()}, torch.device(setting.device), repeats)
    return median(seconds["step"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser("large", __doc__)
    measure.add_sizes(parser, size=224, repeats=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    report = measure.report("large", setting, args.repeats, results={})
    system = System(amp=setting.amp, graphs=setting.graphs == "on")
    print(f"{'search step':28}{'peak MB':>12}{'seconds':>12}")
    for name, options in WAYS.items():
        make = partial(make_step, "search", system, setting, **options)
        peak = measure.in_fresh_process(measure.peak_megabytes, make, setting)
        seconds = None
        if peak is not None:
            seconds = measure.in_fresh_process(seconds_per_step, make, setting, args.repeats)
        report["results"][name] = {"options": options, "peak_mb": peak, "seconds": seconds}
        cells = (f"{value:.1f}" if value else "none" for value in (peak, seconds))
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        if args.out:
            write_json(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
