"""Loss curves of the main run's search, in bfloat16 mixed precision and in single precision.

    python -m benchmarks.precision --threads 2 --out benchmarks/results/mine-precision.json

Searches as `params.yaml` says, with the images that `dvc repro make-longtail` made, for several
seeds in each precision; the exit status is 1 if the precisions differ by more than the seeds do. A
picture is written beside the JSON. See `benchmarks/README.md` for how to read it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from matplotlib.figure import Figure

from benchmarks import measure
from benchmarks.measure import Setting
from benchmarks.systems import System, computing
from ssnas.artifacts import read_splits
from ssnas.config.load import load_main
from ssnas.config.schema import Run
from ssnas.data.views import Normalise
from ssnas.report.style import ACCENT, DARK, save, styled
from ssnas.runtime.device import choose_device
from ssnas.search import search
from ssnas.training.images import TrainingImages

LOSSES = {"loss_alpha": "loss of the α steps", "loss_weights": "loss of the ω steps"}
NAMES = {"off": ("float32", DARK), "bf16": ("bfloat16", ACCENT)}

Curve = list[float]
"""The loss of every epoch."""


def curves(run: Run, seed: int, amp: str, device: torch.device) -> dict[str, Curve]:
    """The curves of one search, without labels."""
    splits = read_splits(run)
    normalise = Normalise.of(splits.train.images)
    images = replace(TrainingImages.of(splits.train, normalise, splits.flip, device), labels=None)
    with computing(System(amp=amp), device):
        history = search(images, run.search, run.views, seed).history
    return {loss: [row[loss] for row in history] for loss in LOSSES}


def comparison(found: Mapping[str, Mapping[str, dict[str, Curve]]], loss: str) -> dict[str, float]:
    """How far apart the precisions are, and the seeds.

    Args:
        found: for each precision and seed the curves.

    Returns:
        `difference`: the mean over seeds and epochs of the distance of the two precisions' losses
        for one seed; `noise`: the mean over epochs of the standard deviation over the seeds in
        float32.
    """
    pairs = [
        (value, other[loss][epoch])
        for seed, other in found["bf16"].items()
        for epoch, value in enumerate(found["off"][seed][loss])
    ]
    by_epoch = zip(*(own[loss] for own in found["off"].values()), strict=True)
    return {
        "difference": fmean(abs(a - b) for a, b in pairs),
        "noise": fmean(map(stdev, by_epoch)),
    }


def draw(report: dict, png: Path) -> None:
    """A panel for each loss with a curve for each seed and precision, from what `main` writes."""
    with styled():
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        for axes, (loss, name) in zip(figure.subplots(1, 2), LOSSES.items(), strict=True):
            for amp, (label, colour) in NAMES.items():
                for index, own in enumerate(report["results"][amp].values()):
                    epochs = range(1, len(own[loss]) + 1)
                    label = label if index == 0 else None
                    axes.plot(epochs, own[loss], color=colour, label=label, linewidth=1.2)
            axes.set(title=name, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid()
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(NAMES))
        save(figure, png)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    measure.add_machine(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON; a PNG goes beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
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
    measure.write_json(args.out, report)
    draw(report, args.out.with_suffix(".png"))
    for loss, name in LOSSES.items():
        own = compared[loss]
        print(f"{name}: precisions differ by {own['difference']:.3f}, seeds by {own['noise']:.3f}")
    return int(any(own["difference"] > own["noise"] for own in compared.values()))


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
