"""All measurements on a GPU, each in a process of its own and saved as soon as it is done.

    python -m benchmarks.gpu --out DIR

Started again, it goes on with what DIR lacks. With `--seconds S` it starts nothing new after S.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FAST = ("--amp", "bf16", "--graphs", "on")
SIZES = ((32, 3), (256, 3), (32, 8), (256, 8))


def plan() -> dict[str, tuple[str, ...]]:
    """List the module and options that write each file, the most important first."""
    steps = {
        f"step-batch-{batch}-cells-{cells}.json": (
            *("benchmarks.step", "--batch", str(batch), "--cells", str(cells), "--repeats", "20"),
            *FAST,
        )
        for batch, cells in SIZES
    }
    return {
        **steps,
        "profile.txt": ("benchmarks.profile", *FAST),
        "scaling.json": ("benchmarks.scaling", *FAST),
    }


def run_missing(
    out: Path, commands: dict[str, tuple[str, ...]], extra: Sequence[str], seconds: float
) -> int:
    """Run what makes the files that are missing, and count those that still are."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name, (module, *options) in commands.items():
        path = out / name
        if path.exists():
            print(f"{name}: there already", flush=True)
        elif time.monotonic() - began > seconds:
            print(f"{name}: left for the next time", flush=True)
        else:
            print(f"{name}: python -m {module} {' '.join([*options, *extra])}", flush=True)
            subprocess.run(
                [sys.executable, "-m", module, *options, *extra, "--out", str(path)], check=False
            )
    return sum(not (out / name).exists() for name in commands)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 while a file is missing. Options unknown to it go to every command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args, extra = parser.parse_known_args(argv)
    return int(run_missing(args.out, plan(), extra, args.seconds) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
