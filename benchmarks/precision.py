"""Loss curves of the main run's search, in bfloat16 mixed precision and in single precision.

    python -m benchmarks.precision --threads 2 --out benchmarks/results/mine-precision.json

Searches as `params.yaml` says, with the images that `dvc repro make-longtail` made, for several
seeds in each precision; the exit status is 1 if the precisions differ by more than the seeds do. A
picture is written beside the JSON. See `benchmarks/README.md` for how to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import measure
from benchmarks.measure import Setting
from benchmarks.systems import System, computing
from ssnas.config.load import load_main
from ssnas.config.schema import Run
from ssnas.data.views import Normalise
from ssnas.pipeline.artifacts import write_json
from ssnas.pipeline.readers import read_splits
from ssnas.report.style import ACCENT, DARK, integer_ticks, save, styled
from ssnas.runtime.device import choose_device
from ssnas.search import search
from ssnas.training.images import TrainingImages

LOSSES = {"loss_alpha": "loss of the α steps", "loss_weights": "loss of the ω steps"}
NAMES = {"off": ("float32", DARK), "bf16": ("bfloat16", ACCENT)}

Curve = list[float]
"""The loss of every epoch."""


def curves(run: Run, seed: int, amp: str, device: torch.device) -> dict[str, Curve]:
    """Search once, without labels, and return the curves."""
    splits = read_splits(run)
    normalise = Normalise.of(splits.train.images)
    images = replace(TrainingImages.of(splits.train, normalise, splits.flip, device), labels=None)
    with computing(System(amp=amp)):
        history = search(images, run.search, run.views, seed).history
    return {loss: [row[loss] for row in history] for loss in LOSSES}


def comparison(
    results: Mapping[str, Mapping[str, Mapping[str, Curve]]], loss: str
) -> dict[str, float]:
    """Measure how far apart the precisions are, and the seeds.

    Args:
        results: for each precision and seed the curves.
        loss: a key of `LOSSES`.

    Returns:
        `difference`: the mean over seeds and epochs of the distance of the two precisions' losses
        for one seed; `noise`: the mean over epochs of the standard deviation over the seeds in
        float32.
    """
    plain, mixed = (
        np.array([curves[loss] for _, curves in sorted(results[amp].items())])
        for amp in ("off", "bf16")
    )
    return {
        "difference": float(abs(plain - mixed).mean()),
        "noise": float(plain.std(axis=0, ddof=1).mean()),
    }


def draw(results: Mapping[str, Mapping[str, Mapping[str, Curve]]], png: Path) -> None:
    """Draw a panel for each loss with a curve for each seed and precision."""
    with styled():
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        for axes, (loss, name) in zip(figure.subplots(1, 2), LOSSES.items(), strict=True):
            for amp, (label, colour) in NAMES.items():
                curves = np.array([curves[loss] for curves in results[amp].values()]).T
                labels = [label] + [None] * (curves.shape[1] - 1)
                epochs = np.arange(1, len(curves) + 1)
                axes.plot(epochs, curves, color=colour, label=labels, linewidth=1.2)
            axes.set(title=name, xlabel="epoch")
            integer_ticks(axes.xaxis)
            axes.grid()
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(NAMES))
        save(figure, png)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser("precision", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, required=True, help="JSON; a PNG goes beside it")
    args = parser.parse_args(argv)
    measure.use_machine(args.threads)
    run, device = load_main(), choose_device(args.device)
    size = read_splits(run).train.images.shape[1]
    sizes = run.search.channels, run.search.cells, run.search.batch_size, size
    setting = Setting(*sizes, "off", "off", args.threads, str(device))
    results: dict[str, dict[str, dict[str, Curve]]] = {amp: {} for amp in NAMES}
    for seed in range(args.seeds):
        for amp in NAMES:
            results[amp][str(seed)] = curves(run, seed, amp, device)
    compared = {loss: comparison(results, loss) for loss in LOSSES}
    report = measure.report("precision", setting, args.seeds, compared=compared, results=results)
    write_json(args.out, report)
    draw(results, args.out.with_suffix(".png"))
    for loss, name in LOSSES.items():
        difference, noise = compared[loss]["difference"], compared[loss]["noise"]
        print(f"{name}: precisions differ by {difference:.3f}, seeds by {noise:.3f}")
    return int(any(row["difference"] > row["noise"] for row in compared.values()))


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
