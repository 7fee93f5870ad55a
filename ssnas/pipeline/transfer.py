"""Move a network to another data set, or a baseline without a row, train and test it there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssnas import metrics
from ssnas.config.decide import Prior, named_prior
from ssnas.config.recipes import sized
from ssnas.config.schema import Finetune, Run, Search
from ssnas.data.splits import folds_of
from ssnas.data.types import Dataset, Source, Splits
from ssnas.data.views import Normalise
from ssnas.finetune import fit, logits_of
from ssnas.networks.backbone import shape_of
from ssnas.networks.derived import inherit, multiply_adds, parameter_count
from ssnas.pipeline.artifacts import (
    Places,
    write_json,
)
from ssnas.pipeline.evaluate import areas, by_decision, calibrate
from ssnas.pipeline.lineage import made_from
from ssnas.pipeline.make_longtail import source_of
from ssnas.pipeline.readers import finetuned_weights, network_of, searched_weights
from ssnas.pipeline.work import computed_by
from ssnas.runtime.device import choose_device, machine, seed_everything
from ssnas.runtime.source import closure
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData


def transfer(run: Run) -> None:
    """Write the figures on the other data set, its provenance and the cost."""
    places, target = Places.of(run), run.transfer
    if target.dataset is None:
        print("no transfer: transfer.dataset names no data set, such as faces")
        for name in ("transfer.json", "transfer.data.json", "transfer.cost.json"):
            write_json(places.metrics("transfers", name), {})
        return
    source = source_of(target)
    named_prior(run.decide, source.train.class_names, source.train.multi_label)
    seed = run.seeds["transfers"]
    weights = _weights(run)
    if weights is not None and run.finetune.network == "derived":
        run = dataclasses.replace(run, search=_as_searched(run.search, weights, source))
    folds = folds_of(source, target.folds, target.val_fraction, seed)
    before = made_from(run, "network") if "rows" in run.folders else {}
    trained_by = dataclasses.replace(run.finetune, loss=target.loss, epochs=target.epochs)
    run = dataclasses.replace(run, finetune=trained_by)
    device = choose_device(run.device)
    identity = {
        "parameters": {
            "seed": seed,
            "transfer": dataclasses.asdict(target),
            "finetune": dataclasses.asdict(run.finetune),
            "row": before,
        },
        "data": source.provenance["sha256"],
        "code": closure("ssnas.pipeline.transfer"),
        "computed_by": computed_by(device),
    }
    trained = [
        _one(run, fold, number, weights, identity, device) for number, fold in enumerate(folds)
    ]
    data = folds[0].train
    network = network_of(run, data)
    sample = Normalise.of(data.images)(torch.from_numpy(data.images[:1]))
    summary = {
        "dataset": target.dataset,
        "folds": len(folds),
        "test_images": sum(len(fold.test) for fold in folds),
        "image_size": data.images.shape[1],
        "classes": data.num_classes,
        "weights": target.weights,
        "loss": target.loss,
        "epochs": sized(run.finetune, len(data)).epochs,
        "parameters": parameter_count(network),
        "multiply_adds": multiply_adds(network, sample),
        "scale": run.scale,
        "seed": seed,
        "decide": run.decide,
        **metrics.mean_std([fold.figures for fold in trained]),
        "decisions": {
            name: metrics.mean_std([fold.decisions[name] for fold in trained])
            for name in trained[0].decisions
        },
        "intervals": _intervals(trained, folds),
    }
    write_json(places.metrics("transfers", "transfer.json"), summary)
    write_json(places.metrics("transfers", "transfer.data.json"), source.provenance)
    cost = {"seconds": round(sum(fold.seconds for fold in trained), 1), **machine(device)}
    write_json(places.metrics("transfers", "transfer.cost.json"), cost)
    for number in range(len(folds)):
        Checkpoint(_folder(run, number), identity).finish()


def _as_searched(search: Search, weights: dict[str, Tensor], source: Source) -> Search:
    """Replace `stem` and `channels`, where they are null, by those of the searched network."""
    size = source.train.images.shape[1]
    stem, channels = shape_of(weights, search.stem_multiplier, size)
    return dataclasses.replace(
        search, stem=search.stem or stem, channels=search.channels or channels
    )


def _weights(run: Run) -> dict[str, Tensor] | None:
    if run.transfer.weights == "search":
        return searched_weights(run)
    if run.transfer.weights == "finetune":
        return finetuned_weights(run)
    return None


def _network(run: Run, data: Dataset, weights: dict[str, Tensor] | None) -> nn.Module:
    network = network_of(run, data)
    if weights is not None:
        inherit(network, weights)
    return network


def _one(
    run: Run,
    fold: Splits,
    number: int,
    weights: dict[str, Tensor] | None,
    identity: dict[str, Any],
    device: torch.device,
) -> Tested:
    with Checkpoint(_folder(run, number), identity) as checkpoint:
        return train_and_test(
            lambda: _network(run, fold.train, weights),
            fold,
            run.finetune,
            run.seeds["transfers"],
            device,
            f"transfer, part {number + 1}",
            checkpoint,
            run.decide,
        )


@dataclasses.dataclass(frozen=True)
class Tested:
    """The test of one fold.

    Attributes:
        figures: by the run's own decision.
        decisions: the figures of each decision that depend on it.
        probabilities: (N, C) of the test images, by the run's own decision.
        seconds: that the training took.
    """

    figures: dict[str, float]
    decisions: dict[str, dict[str, float]]
    probabilities: np.ndarray
    seconds: float


def train_and_test(
    build: Callable[[], nn.Module],
    fold: Splits,
    config: Finetune,
    seed: int,
    device: torch.device,
    name: str,
    checkpoint: Checkpoint,
    decide: Prior = "published",
) -> Tested:
    """Train a network on one fold, and test it there.

    A finished fold's checkpoint stays, so that an interrupted cross-validation does not train its
    finished folds again.

    Args:
        build: makes the network, for the fold's channels and classes; called once the global random
            generators have their seed.
        fold: one of `ssnas.data.folds_of`.
        name: of the fold, in messages.
        decide: the decision of the figures.
    """
    seed_everything(seed)
    network = build()
    data = TrainingData.of(fold)
    result = fit(network, data, config, seed, device, name, checkpoint)
    train, test = fold.train, fold.test
    decision = calibrate(config, network, fold, data.normalise, device)
    logits = logits_of(network, test, data.normalise, device)
    chosen = named_prior(decide, train.class_names, train.multi_label)
    probabilities = decision(logits, chosen).numpy()
    figures = metrics.figures(
        probabilities, test.labels, thresholds=decision.threshold(chosen)
    ) | areas(decision, logits, test)
    return Tested(figures, by_decision(decision, logits, test), probabilities, result.seconds)


def _intervals(
    trained: Sequence[Tested], folds: Sequence[Splits]
) -> dict[str, tuple[float, float]]:
    """Bootstrap the 95 % intervals over the test images of all folds.

    Probabilities of several networks are not ranked against one another, so AUC has none.
    """
    probabilities = np.concatenate([fold.probabilities for fold in trained])
    labels = np.concatenate([fold.test.labels for fold in folds])
    grouped = [fold.test.groups for fold in folds if fold.test.groups is not None]
    groups = np.concatenate(grouped) if len(grouped) == len(folds) else None
    intervals = metrics.intervals(probabilities, labels, groups=groups)
    return {key: value for key, value in intervals.items() if key != "macro_auc"}


def _folder(run: Run, number: int) -> Path:
    return Places.of(run).checkpoint("transfers", f"transfer-{number}")
