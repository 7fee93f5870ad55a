"""Train the derived network, from the searched weights, on the long-tailed labels."""

import torch

from ssnas import datasets
from ssnas.artifacts import (
    Places,
    finetune_description,
    load_weights,
    read_splits,
    save_weights,
    search_description,
    write_csv,
    write_json,
)
from ssnas.augment import Normalise
from ssnas.checkpoint import Checkpoint, code_digest
from ssnas.config import Run
from ssnas.derived import build_network
from ssnas.distributed import process_group, rank
from ssnas.network import Network, inherit, multiply_adds, parameter_count
from ssnas.runtime import choose_device, machine, peak_memory_mb, seed_everything
from ssnas.train import Fitted, fit, latency_ms
from stages.common import main


def finetune(run: Run) -> None:
    places, device = Places(run.folders), choose_device(run.device)
    splits = read_splits(run)
    normalise = Normalise.of(splits.train.images)
    seed_everything(run.seeds["rows"])
    network = build_network(run, splits.train)
    weights = load_weights(places.supernet, search_description(run))
    if run.finetune.inherit:
        inherit(network, weights)
    description = finetune_description(run)
    identity = {"parameters": description, "code": code_digest()}
    folder = places.checkpoint("rows", "finetune")
    flip = splits.flip if run.data.flip is None else run.data.flip
    with process_group(device), Checkpoint(folder / str(rank()), identity) as checkpoint:
        fitted = fit(
            network,
            splits.train,
            splits.val,
            normalise,
            flip,
            run.finetune,
            run.seeds["rows"],
            device,
            checkpoint=checkpoint,
        )
        if rank() == 0:
            save_weights(places.network, network.state_dict(), description)
            _write(run, fitted, network, splits, normalise, device)
        checkpoint.finish()


def _write(
    run: Run,
    fitted: Fitted,
    network: Network,
    splits: datasets.Splits,
    normalise: Normalise,
    device: torch.device,
) -> None:
    places = Places(run.folders)
    write_csv(places.metrics("rows", "finetune.csv"), fitted.history)
    sample = normalise(torch.from_numpy(splits.val.images[:1]).to(device))
    facts = {
        "parameters": parameter_count(network),
        "multiply_adds": multiply_adds(network, sample),
        "loss": run.finetune.loss,
        "epochs": len(fitted.history),
        "epoch": fitted.epoch,
        "inherited": run.finetune.inherit,
        "scale": run.scale,
        "seed": run.seeds["rows"],
        "dataset": run.data.dataset,
    }
    write_json(places.metrics("rows", "finetune.json"), facts)
    cost = {
        "seconds": round(fitted.seconds, 1),
        "images_per_second": fitted.history[-1]["images_per_second"],
        "latency_ms_per_image": round(latency_ms(network, splits.val, normalise, device), 3),
        "peak_memory_mb": round(peak_memory_mb(device)),
        **machine(device),
    }
    write_json(places.metrics("rows", "finetune.cost.json"), cost)


if __name__ == "__main__":
    main("rows", finetune)
