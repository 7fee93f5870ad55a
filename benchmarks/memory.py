"""Run the stages on more images than the memory should hold, and print what each one takes.

    python -m benchmarks.memory FOLDER --images 1000000

The images are noise of 32 x 32 pixels in colour, written to FOLDER once (3 GB for a million). The
network is the smallest there is: what is measured is how the images are held, not the network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import yaml

from ssnas.runtime.mapped import chunks, scratch, write_npz

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("make_longtail", "search", "derive_genotype", "finetune", "evaluate", "export")
CLASSES = 10


def write_images(path: Path, count: int) -> None:
    """Write an .npz of noise whose brightness is the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count)
    images = scratch((count, 32, 32, 3))
    for part in chunks(images):
        images[part] = rng.integers(0, 80, images[part].shape, dtype=np.uint8)
        images[part] += (15 * labels[part])[:, None, None, None].astype(np.uint8)
    with path.open("wb") as file:
        write_npz(file, {"train_images": images, "train_labels": labels})


def parameters(images: Path, epochs: int) -> dict[str, object]:
    """The parameters of a run with the smallest network."""
    small = {"channels": 2, "epochs": epochs, "batch_size": 64, "projector": 8, "knn_every": 1}
    return {
        "dataset": str(images),
        "data": {"profile": "natural"},
        "scales": {"small": {"search": small, "finetune": {"epochs": epochs, "batch_size": 64}}},
        "device": "cpu",
    }


def peak_memory(command: list[str], folder: Path, seconds: float) -> tuple[float, float, int]:
    """Run a command, at most so long, and return its peak of resident MB, its seconds, its status.

    The resident memory is that of /proc: with the pages of mapped files that it holds.
    """
    began, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, cwd=folder, env=None)
    timer = threading.Timer(seconds, process.terminate)
    timer.start()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            peak = max(peak, int(resident.split()[1]) / 1024)
        except (OSError, StopIteration):
            pass
        time.sleep(0.02)
    timer.cancel()
    return peak, time.monotonic() - began, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=600, help="the longest that a stage may run"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / f"noise-{options.images}.npz"
    if not images.exists():
        write_images(images, options.images)
    text = yaml.safe_dump(parameters(images, options.epochs))
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    python = [sys.executable, "-c"]
    load = "import sys; sys.path.insert(0, {root!r}); import ssnas.pipeline.fit, stages.cli"
    own, _, _ = peak_memory([*python, load.format(root=str(ROOT))], folder, 60)
    print(
        f"the libraries alone take {own:,.0f} MB; {images.stat().st_size / 2**20:,.0f} MB of images"
    )
    print(f"{'stage':<18}{'MB beyond':>12}{'seconds':>10}{'status':>8}")
    for stage in STAGES:
        run = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); "
        run += f"sys.argv = ['{stage}']; runpy.run_module('stages.{stage}', run_name='__main__')"
        peak, seconds, status = peak_memory([*python, run], folder, options.seconds)
        print(f"{stage:<18}{peak - own:>12,.0f}{seconds:>10.1f}{status:>8}", flush=True)


if __name__ == "__main__":
    main()
