"""Train systems on the same splits for the same seconds, and compare them on the test images.

    python -m benchmarks.bakeoff run --out benchmarks/results/bakeoff.csv
    python -m benchmarks.bakeoff page --results benchmarks/results/bakeoff.csv

`run` appends a row for each data set, seed and system, and skips the rows that are there. A data
set whose images are not in data/raw is left out, and named. `page` writes the table and the plot of
docs/bakeoff.md.

Every system has the seconds of its data set on one thread, the search included. Its number of
epochs follows from a few measured steps. All networks train by the same recipe and loss; the test
images are read once, after the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import bakeoff_page
from benchmarks.measure import git
from ssnas import metrics
from ssnas.config.load import load_options
from ssnas.config.recipes import shaped, sized, within
from ssnas.config.schema import Run
from ssnas.data.raw import raw_paths
from ssnas.data.types import Dataset, Splits
from ssnas.decision import fit_temperature, probabilities, with_prior
from ssnas.finetune import epoch_seconds, fit, latency_ms, logits_of, pretrain
from ssnas.networks.baselines import build_baseline
from ssnas.networks.baselines.linear import linear_classifier
from ssnas.networks.derived import DerivedNetwork, inherit, parameter_count
from ssnas.networks.factory import build_network
from ssnas.networks.genotype import FIXED, Genotype, derive
from ssnas.networks.operations import RELAXATIONS
from ssnas.networks.space import CELL_KINDS, EDGES
from ssnas.pipeline.artifacts import RAW
from ssnas.pipeline.budget import SEARCH_SHARE
from ssnas.pipeline.evaluate import calibrate
from ssnas.pipeline.make_longtail import source_of, splits_of
from ssnas.pipeline.search import images_of
from ssnas.report.papers.readme import replace_block
from ssnas.runtime.allocator import keep_freed_memory
from ssnas.runtime.device import machine, seed_everything
from ssnas.search import epoch_seconds as search_epoch_seconds
from ssnas.search import search
from ssnas.training.images import TrainingData

CPU = torch.device("cpu")
RESULTS = Path("benchmarks/results/bakeoff.csv")
BUNDLED = ("digits", "faces")
"""Data sets that come with packages."""

PAGE, PLOT = Path("docs/bakeoff.md"), Path("docs/images/bakeoff.svg")


@dataclass(frozen=True)
class Task:
    """A data set, how it is split, and the seconds that a system may train.

    Attributes:
        data: parameters of the section `data`.
        seconds: of training.
        prior: the frequencies among the test images, for the log-loss.
    """

    data: dict[str, Any]
    seconds: float
    prior: str = "balanced"


def _long_tailed(dataset: str, imbalance: float, seconds: float) -> Task:
    data = {"dataset": dataset, "profile": "exponential", "imbalance": imbalance}
    return Task({**data, "largest_class": 1000}, seconds)


TASKS = {
    "digits-LT, ρ = 10": Task(
        {"dataset": "digits", "profile": "exponential", "largest_class": 250}, 10
    ),
    "faces, ρ = 3": Task({"dataset": "faces", "profile": "exponential", "imbalance": 3}, 5),
    "Fashion-MNIST-LT, ρ = 10": _long_tailed("fashion-mnist", 10, 30),
    "Fashion-MNIST-LT, ρ = 100": _long_tailed("fashion-mnist", 100, 20),
    "CIFAR-10-LT, ρ = 10": _long_tailed("cifar10", 10, 40),
    "CIFAR-10-LT, ρ = 100": _long_tailed("cifar10", 100, 20),
    "COVID-19 X-rays": Task({"dataset": "covid19-xray", "size": 32}, 15, "natural"),
    "ChestMNIST": Task({"dataset": "medmnist:chestmnist"}, 15, "natural"),
}


@dataclass(frozen=True)
class Trained:
    """What a system makes of a task.

    Attributes:
        probabilities: (N, C) of the test images: `balanced`, when all classes are equally
            frequent, and `natural`, when they are as frequent as among the training images.
        parameters: of the network, or None.
        latency: milliseconds an image, or None.
        seconds: that the training took, a search included.
    """

    probabilities: dict[str, np.ndarray]
    parameters: int | None
    latency: float | None
    seconds: float


System = Callable[[Splits, Run, float, int], Trained]
"""From images, parameters, seconds and a seed to what was trained."""


def _train(
    build: Callable[[], nn.Module], splits: Splits, run: Run, seconds: float, seed: int
) -> Trained:
    """Train a network for as many of the seconds as building it has left."""
    began = time.perf_counter()
    seed_everything(seed)
    network, data = build(), TrainingData.of(splits)
    measured = epoch_seconds(network, data, run.finetune, CPU)
    left = seconds - (time.perf_counter() - began)
    fit(network, data, within(run.finetune, left, measured), seed, CPU)
    took = time.perf_counter() - began
    decision = calibrate(run.finetune, network, splits, data.normalise, CPU)
    logits = logits_of(network, splits.test, data.normalise, CPU)
    return Trained(
        {name: decision(logits, name).numpy() for name in PRIORS},
        parameter_count(network),
        latency_ms(network, splits.val, data.normalise, CPU),
        took,
    )


def _baseline(name: str) -> System:
    def system(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
        classes, (size, _, channels) = splits.train.num_classes, splits.train.images.shape[1:]
        return _train(
            lambda: build_baseline(name, classes, channels, size), splits, run, seconds, seed
        )

    return system


def _network(splits: Splits, run: Run, genotype: Genotype) -> nn.Module:
    shape = splits.train.images.shape[1:]
    return build_network(run.finetune, run.search, genotype, splits.train.num_classes, shape)


def fixed(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
    """Train the fixed genotype of `--search none`."""
    return _train(lambda: _network(splits, run, FIXED), splits, run, seconds, seed)


def random_genotype(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
    """Train a random genotype of as many parameters as the fixed one, another with each seed."""
    parameters = parameter_count(_network(splits, run, FIXED))
    alike = dataclasses.replace(run.finetune, parameters=parameters, inherit=False)
    run = dataclasses.replace(run, finetune=alike)
    genotype = drawn_genotype(seed)
    return _train(lambda: _network(splits, run, genotype), splits, run, seconds, seed)


def drawn_genotype(seed: int) -> Genotype:
    """Draw an operation for each edge, all equally likely."""
    rng = np.random.default_rng(seed)
    shape = len(EDGES), len(RELAXATIONS["sigmoid"])
    return derive({kind: rng.random(shape) for kind in CELL_KINDS})


def _searched(inherits: bool, chooses: bool = True) -> System:
    """Make the system that searches without labels for a share of the seconds, and then trains.

    Args:
        inherits: whether the network starts from the searched weights.
        chooses: whether the genotype is the searched one, or a random one.
    """

    def system(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
        def build() -> nn.Module:
            began = time.perf_counter()
            images = images_of(run, splits, CPU)
            measured = search_epoch_seconds(images, run.search, run.views)
            left = SEARCH_SHARE * seconds - (time.perf_counter() - began)
            supernet = search(images, within(run.search, left, measured), run.views, seed).supernet
            weights = {kind: w.detach().numpy() for kind, w in supernet.architecture().items()}
            genotype = derive(weights, "argmax") if chooses else drawn_genotype(seed)
            network = _network(splits, run, genotype)
            if inherits:
                inherit(network, supernet.state_dict())
            return network

        return _train(build, splits, run, seconds, seed)

    return system


def pretrained(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
    """Train the fixed genotype's features without labels for a share of the seconds, then all."""

    def build() -> nn.Module:
        began = time.perf_counter()
        network = _network(splits, run, FIXED)
        assert isinstance(network, DerivedNetwork)
        pixels = images_of(run, splits, CPU).pixels.numpy()
        every = Dataset(pixels, np.zeros(len(pixels), np.int64), ("any",))
        data = dataclasses.replace(TrainingData.of(splits), train=every)
        one = dataclasses.replace(sized(run.finetune, len(every)), pretrain_epochs=1)
        measured = pretrain(copy.deepcopy(network), data, one, run.search, run.views, seed, CPU)
        left = SEARCH_SHARE * seconds - (time.perf_counter() - began)
        epochs = within(one, left, measured).epochs
        config = dataclasses.replace(one, pretrain_epochs=epochs)
        pretrain(network, data, config, run.search, run.views, seed, CPU)
        return network

    return _train(build, splits, run, seconds, seed)


def logistic_regression(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
    """Fit the linear classifier of raw pixels that `evaluate` shows beside a network."""
    began = time.perf_counter()
    train = splits.train
    natural = linear_classifier(train, splits.val, splits.test)
    took = time.perf_counter() - began
    prior = np.array(train.counts) / len(train)
    balanced = with_prior(natural, prior, "balanced", train.multi_label)
    weights = train.num_classes * (train.images[0].size + 1)
    return Trained({"natural": natural, "balanced": balanced}, weights, None, took)


def hog_svm(splits: Splits, run: Run, seconds: float, seed: int) -> Trained:
    """Fit support vector machines, one a class, on histograms of oriented gradients.

    Classes weigh alike. Of `PENALTIES` the one with the best validation figure is taken, and the
    margins divided by a temperature are the evidence of each class.
    """
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    began = time.perf_counter()
    train, multi = splits.train, splits.train.multi_label
    x, held_out, shown = (_gradients(part) for part in (train, splits.val, splits.test))
    prior = np.array(train.counts) / len(train)
    best: tuple[float, Any] = (-np.inf, None)
    for penalty in PENALTIES:
        machine = SVC(C=penalty, class_weight="balanced")
        model = make_pipeline(StandardScaler(), OneVsRestClassifier(machine)).fit(x, train.labels)
        figure = metrics.figures(_alike(_margins(model, held_out), multi), splits.val.labels)
        figure = figure.get("macro_auc" if multi else "balanced_accuracy", 0.0)
        if figure > best[0]:
            best = figure, model
    log_prior = torch.from_numpy(np.log(prior))
    temperature = 1.0
    if not multi:
        temperature = fit_temperature(
            torch.from_numpy(_margins(best[1], held_out)) + log_prior, splits.val.labels, prior
        )
    balanced = _alike(_margins(best[1], shown) / temperature, multi)
    took = time.perf_counter() - began
    uniform = np.full(len(prior), 0.5 if multi else 1 / len(prior))
    natural = with_prior(balanced, uniform, prior, multi)
    return Trained({"balanced": balanced, "natural": natural}, None, None, took)


def _gradients(data: Dataset) -> np.ndarray:
    """Compute the histograms of oriented gradients of the images, in 4 × 4 cells."""
    from skimage.feature import hog

    cell = data.images.shape[1] // 4
    grey = data.images.mean(axis=-1)
    cells = {"pixels_per_cell": (cell, cell), "cells_per_block": (2, 2)}
    return np.stack([hog(image, **cells) for image in grey])


def _margins(model: Any, features: np.ndarray) -> np.ndarray:
    margins = model.decision_function(features)
    return np.stack([-margins, margins], axis=1) if margins.ndim == 1 else margins


def _alike(margins: np.ndarray, multi_label: bool) -> np.ndarray:
    """Probabilities of margins, when all classes are equally frequent."""
    return probabilities(torch.from_numpy(margins), multi_label).numpy()


PENALTIES = (0.3, 1.0, 10.0)
PRIORS = ("balanced", "natural")

SYSTEMS: dict[str, System] = {
    "ours, searched": _searched(inherits=True),
    "ours, fixed genotype": fixed,
    "random genotypes": random_genotype,
    "plain CNN": _baseline("plain-cnn"),
    "ResNet-18": _baseline("resnet-18"),
    "ShuffleNet V2": _baseline("shufflenet"),
    "HOG + SVM": hog_svm,
    "logistic regression": logistic_regression,
}
CONTROLS: dict[str, System] = {
    "ours, fixed genotype": fixed,
    "fixed genotype, pre-trained": pretrained,
    "searched, inheriting": _searched(inherits=True),
    "searched, from scratch": _searched(inherits=False),
    "random, inheriting": _searched(inherits=True, chooses=False),
    "random genotypes": random_genotype,
}
"""What tells apart the shares of genotype, inheritance and self-supervised training."""


REFERENCE = "ours, fixed genotype"


def measure(
    task: Task, system: System, seed: int, seconds: float, labelled: float = 1.0
) -> dict[str, Any]:
    """Train a system on one split of a data set, and give its row of figures.

    Args:
        labelled: the share of the training images that keep their labels.
    """
    run = run_of(task, seed, labelled)
    splits = splits_of(run, source_of(run.data))
    shape = shaped(run.search, len(splits.train), splits.train.images.shape[1])
    run = dataclasses.replace(run, search=shape)
    trained = system(splits, run, seconds, seed)
    test, train = splits.test, splits.train
    counted = metrics.figures(trained.probabilities["balanced"], test.labels, train.counts)
    truthful = metrics.figures(trained.probabilities[task.prior], test.labels)
    return {
        "balanced_accuracy": counted.get("balanced_accuracy"),
        "macro_auc": counted.get("macro_auc"),
        "log_loss": truthful.get("log_loss"),
        "few_shot": counted.get("few_shot"),
        "parameters": trained.parameters,
        "latency_ms": trained.latency,
        "seconds": round(trained.seconds, 1),
        "train_images": len(train),
        "test_images": len(test),
    }


def run_of(task: Task, seed: int, labelled: float) -> Run:
    """Make the parameters of a task: those of `ssnas fit` with a search."""
    options = {"seed": seed, "device": "cpu", "labelled_fraction": labelled}
    return load_options({**task.data, **options, "search": "barlow-twins"}, None, Path())


def available(names: Sequence[str]) -> list[str]:
    """List the data sets whose images are here, and print which are not."""
    present = []
    for name in names:
        dataset = TASKS[name].data["dataset"]
        if dataset in BUNDLED or raw_paths(dataset, RAW):
            present.append(name)
        else:
            print(f"{name}: left out, since {RAW} has no images of it")
    return present


def run_all(options: argparse.Namespace) -> None:
    """Measure what is not in the file yet, seed by seed, so that all systems have as many."""
    rows = read(options.out)
    done = {(row["data"], row["seed"], row["system"], float(row["budget"])) for row in rows}
    names = available(options.tasks)
    systems = CONTROLS if options.labelled else SYSTEMS
    for seed, share, labelled, name, system in itertools.product(
        options.seeds,
        options.shares,
        options.labelled or [1.0],
        names,
        options.systems or systems,
    ):
        seconds = share * (options.seconds or TASKS[name].seconds)
        shown = f"{name}, {labelled:.0%} of the labels" if options.labelled else name
        if (shown, str(seed), system, seconds) in done:
            continue
        row = {"data": shown, "seed": seed, "system": system, "budget": seconds}
        row |= measure(TASKS[name], systems[system], seed, seconds, labelled)
        append(
            options.out, row | {"commit": git("describe", "--always", "--dirty"), **machine(CPU)}
        )
        balanced = row["balanced_accuracy"] or float("nan")
        print(
            f"{shown}, seed {seed}, {system}: balanced accuracy {balanced:.3f}, "
            f"AUC {row['macro_auc']:.3f}, {row['seconds']} s of {seconds:g}",
            flush=True,
        )


def write_page(options: argparse.Namespace) -> None:
    """Replace what stands between the page's marks by the tables of the results."""
    results = bakeoff_page.Results(read(options.results), REFERENCE)
    text = options.page.read_text(encoding="utf-8")
    content = f"{bakeoff_page.verdicts(results)}\n\n{bakeoff_page.tables(results)}"
    options.page.write_text(replace_block(text, content), encoding="utf-8")
    bakeoff_page.plot(results, options.plot)


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file of results; none where it is missing."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of results."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train and test")
    run.set_defaults(act=run_all)
    run.add_argument("--out", type=Path, default=RESULTS)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="DATA")
    run.add_argument("--systems", nargs="+", choices={**SYSTEMS, **CONTROLS}, metavar="SYSTEM")
    run.add_argument(
        "--labelled", nargs="+", type=float, help="shares of the labels: compares the controls"
    )
    run.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    run.add_argument("--seconds", type=float, help="instead of those of each data set")
    run.add_argument(
        "--shares", nargs="+", type=float, default=[1.0, 0.25], help="of the seconds (1 0.25)"
    )
    page = commands.add_parser("page", help="write docs/bakeoff.md and its plot")
    page.set_defaults(act=write_page)
    page.add_argument("--results", type=Path, default=RESULTS)
    page.add_argument("--page", type=Path, default=PAGE)
    page.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)
    options.act(options)


if __name__ == "__main__":
    main()
