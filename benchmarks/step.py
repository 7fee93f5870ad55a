"""Times one search step and one fine-tuning step against the same networks computed plainly.

    python -m benchmarks.step --what both --threads 2 --out benchmarks/results/mine.json

See `benchmarks/README.md` for what is measured and how.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ssnas.genotype import derive
from ssnas.losses import barlow_twins, zero_one
from ssnas.network import Network
from ssnas.supernet import PlainSupernet, Supernet, frozen_statistics

SEED = 0
NUM_CLASSES = 10
EMBEDDING = 256
WARM_UP = 2
TOLERANCE = {"off": 1e-3, "bf16": 5e-2}
"""Relative difference allowed between the two systems' losses."""


class PlainNetwork(Network):
    """The derived network computed as `PlainSupernet` is: one operation at a time, contiguous."""

    arrange = PlainSupernet.arrange
    run_cell = PlainSupernet.run_cell


class SearchStep:
    """One first-order bilevel step: α on one batch, then ω on another.

    Calling it returns (α's loss, ω's loss), both taken before their own update.
    """

    def __init__(self, plain: bool, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.plain = plain
        self.amp = _autocast(args)
        supernet = (PlainSupernet if plain else Supernet)(args.channels, args.cells)
        projector = nn.Sequential(
            nn.Linear(supernet.out_features, EMBEDDING, bias=False),
            nn.BatchNorm1d(EMBEDDING),
            nn.ReLU(),
            nn.Linear(EMBEDDING, EMBEDDING),
        )
        self.supernet, self.projector = supernet.to(args.device), projector.to(args.device)
        self.alphas = list(self.supernet.alphas.parameters())
        self.weights = [*self.supernet.weights(), *self.projector.parameters()]
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3
        )
        self.weight_optimizer = _sgd(self.weights)
        self.alpha_views, self.weight_views = (
            [_images(args) for _view in range(2)] for _batch in range(2)
        )

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._train_only(self.alphas, self.weights)
        with frozen_statistics(self.supernet), self.amp:
            alpha_loss = self._barlow_twins(self.alpha_views)
            architecture = torch.cat(list(self.supernet.architecture().values()))
            alpha_loss = alpha_loss + 10 * zero_one(architecture)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        self._train_only(self.weights, self.alphas)
        with self.amp:
            weight_loss = self._barlow_twins(self.weight_views)
        _descend(self.weight_optimizer, self.weights, weight_loss)
        return alpha_loss.detach(), weight_loss.detach()

    def _barlow_twins(self, views: Sequence[Tensor]) -> Tensor:
        return barlow_twins(*(self.projector(self.supernet(view)) for view in views))

    def _train_only(self, trained: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Spare autograd the gradients nobody reads; the published codes compute them all."""
        if self.plain:
            return
        for parameter in trained:
            parameter.requires_grad_(True)
        for parameter in others:
            parameter.requires_grad_(False)


class FinetuneStep:
    """One supervised step of the network that argmax derives from random α."""

    def __init__(self, plain: bool, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.amp = _autocast(args)
        architecture = Supernet(args.channels, args.cells).architecture()
        genotype = derive({kind: weights.detach() for kind, weights in architecture.items()})
        network = (PlainNetwork if plain else Network)(
            genotype, args.channels, args.cells, NUM_CLASSES
        )
        self.network = network.to(args.device)
        self.weights = list(self.network.parameters())
        self.optimizer = _sgd(self.weights)
        self.images = _images(args)
        self.labels = torch.randint(NUM_CLASSES, (args.batch,)).to(args.device)

    def __call__(self) -> tuple[Tensor]:
        with self.amp:
            loss = nn.functional.cross_entropy(self.network(self.images), self.labels)
        _descend(self.optimizer, self.weights, loss)
        return (loss.detach(),)


STEPS = {"search": SearchStep, "finetune": FinetuneStep}
SYSTEMS = {"fast": False, "plain": True}
"""Each system's argument `plain`, in the order in which they take turns."""


def _autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(
        torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.amp == "bf16"
    )


def _images(args: argparse.Namespace) -> Tensor:
    return torch.randn(args.batch, 3, args.size, args.size).to(args.device)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.025, momentum=0.9, weight_decay=3e-4)


def _descend(optimizer: torch.optim.SGD, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()


def peak_megabytes(what: str, system: str, args: argparse.Namespace) -> float:
    """Memory that two steps need at their peak; call it in a fresh process.

    On a CPU it is the growth of the process beyond imports and model (10⁶ bytes); on CUDA it is
    what the allocator handed out at most, the model included.
    """
    torch.set_num_threads(args.threads)
    step = STEPS[what](SYSTEMS[system], args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated(args.device) / 1e6
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024) / 1e6


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(what: str, peaks: dict[str, float], args: argparse.Namespace) -> dict:
    """Losses and times of both systems on the step `what`, with their peak memory."""
    steps = {name: STEPS[what](plain, args) for name, plain in SYSTEMS.items()}
    losses = {name: [loss.item() for loss in step()] for name, step in steps.items()}
    agree = all(
        math.isclose(fast, plain, rel_tol=TOLERANCE[args.amp])
        for fast, plain in zip(losses["fast"], losses["plain"], strict=True)
    )
    seconds = interleaved(steps, args)
    figures = {
        name: {
            "median_ms": 1e3 * median(times),
            "min_ms": 1e3 * min(times),
            "images_per_second": args.batch / median(times),
            "peak_mb": peaks[name],
        }
        for name, times in seconds.items()
    }
    return {
        "losses": losses,
        "losses_agree": agree,
        **figures,
        "ratio": {
            key: figures["plain"][key] / figures["fast"][key] for key in ("median_ms", "min_ms")
        },
    }


def interleaved(
    steps: dict[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each repeat; the systems take turns, so that both meet the same noise."""
    device = torch.device(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-WARM_UP, args.repeats):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str | None:
    """What git prints, or None outside a repository or before its first commit."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def print_table(what: str, result: dict) -> None:
    losses = "; ".join(
        f"{name} {', '.join(f'{loss:.6g}' for loss in result['losses'][name])}" for name in SYSTEMS
    )
    verdict = "agree" if result["losses_agree"] else "DISAGREE"
    print(f"\n{what}: losses of the first step {verdict} ({losses})")
    print(f"{'system':8}{'median ms':>12}{'min ms':>12}{'images/s':>12}{'peak MB':>12}{'ratio':>8}")
    for name in SYSTEMS:
        row = result[name]
        ratio = result["ratio"]["median_ms"] if name == "fast" else 1.0
        print(
            f"{name:8}{row['median_ms']:12.1f}{row['min_ms']:12.1f}"
            f"{row['images_per_second']:12.1f}{row['peak_mb']:12.1f}{ratio:8.2f}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--what", choices=[*STEPS, "both"], default="both")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=list(TOLERANCE), default="off")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if the two systems' losses differ: then the times compare nothing."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    whats = list(STEPS) if args.what == "both" else [args.what]
    settings = {
        key: getattr(args, key) for key in ("channels", "batch", "cells", "size", "repeats", "amp")
    }
    report = {"environment": environment(args), "settings": settings}
    # Memory first: on Linux, a child's ru_maxrss starts from its parent's size.
    peaks = {
        what: {name: in_fresh_process(peak_megabytes, what, name, args) for name in SYSTEMS}
        for what in whats
    }
    report["results"] = {what: compare(what, peaks[what], args) for what in whats}
    for what in whats:
        print_table(what, report["results"][what])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return int(not all(result["losses_agree"] for result in report["results"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
