"""Move a network to another data set, or a baseline without a row, train and test it there."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssnas import data as datasets
from ssnas.artifacts import (
    Places,
    finetune_description,
    load_weights,
    search_description,
    write_json,
)
from ssnas.config.schema import Run
from ssnas.data.views import Normalise
from ssnas.metrics import mean_std
from ssnas.networks.derived import inherit, multiply_adds, parameter_count
from ssnas.runtime.device import choose_device, machine
from ssnas.runtime.source import closure
from ssnas.training.checkpoint import Checkpoint
from ssnas.transfer import folds_of, train_and_test
from stages.cli import main
from stages.network import network_of

RAW = Path("data/raw")


def transfer(run: Run) -> None:
    """Write the figures on the other data set, its provenance and the cost."""
    places, target = Places(run.folders), run.transfer
    if target.dataset is None:
        print("no transfer: transfer.dataset names no data set, such as faces")
        for name in ("transfer.json", "transfer.data.json", "transfer.cost.json"):
            write_json(places.metrics("transfers", name), {})
        return
    source = datasets.load(
        target.dataset, RAW, target.size, target.channels, target.bad_images, target.flip
    )
    seed = run.seeds["transfers"]
    weights = _weights(run)
    folds = folds_of(source, target.folds, target.val_fraction, seed)
    before = finetune_description(run) if "rows" in run.folders else {}
    trained_by = dataclasses.replace(run.finetune, loss=target.loss, epochs=target.epochs)
    run = dataclasses.replace(run, finetune=trained_by)
    identity = {
        "parameters": {
            "seed": seed,
            "transfer": dataclasses.asdict(target),
            "finetune": dataclasses.asdict(run.finetune),
            "row": before,
        },
        "data": source.provenance["sha256"],
        "code": closure("stages.transfer"),
    }
    device = choose_device(run.device)
    trained = [
        _one(run, fold, number, weights, identity, device) for number, fold in enumerate(folds)
    ]
    results, seconds = zip(*trained, strict=True)
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
        "epochs": target.epochs,
        "parameters": parameter_count(network),
        "multiply_adds": multiply_adds(network, sample),
        "scale": run.scale,
        "seed": seed,
        **mean_std(results),
    }
    write_json(places.metrics("transfers", "transfer.json"), summary)
    write_json(places.metrics("transfers", "transfer.data.json"), source.provenance)
    cost = {"seconds": round(sum(seconds), 1), **machine(device)}
    write_json(places.metrics("transfers", "transfer.cost.json"), cost)
    for number in range(len(folds)):
        Checkpoint(_folder(run, number), identity).finish()


def _weights(run: Run) -> dict[str, Tensor] | None:
    places = Places(run.folders)
    if run.transfer.weights == "search":
        return load_weights(places.supernet, search_description(run))
    if run.transfer.weights == "finetune":
        return load_weights(places.network, finetune_description(run))
    return None


def _network(run: Run, data: datasets.Dataset, weights: dict[str, Tensor] | None) -> nn.Module:
    network = network_of(run, data)
    if weights is not None:
        inherit(network, weights)
    return network


def _one(
    run: Run,
    fold: datasets.Splits,
    number: int,
    weights: dict[str, Tensor] | None,
    identity: dict[str, Any],
    device: torch.device,
) -> tuple[dict[str, float], float]:
    with Checkpoint(_folder(run, number), identity) as checkpoint:
        return train_and_test(
            lambda: _network(run, fold.train, weights),
            fold,
            run.finetune,
            run.seeds["transfers"],
            device,
            f"transfer, part {number + 1}",
            checkpoint,
        )


def _folder(run: Run, number: int) -> Path:
    return Places(run.folders).checkpoint("transfers", f"transfer-{number}")


if __name__ == "__main__":
    main(("transfers", "crossvalidations"), transfer)
