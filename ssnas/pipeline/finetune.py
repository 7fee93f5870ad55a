"""Train the derived network, from the searched weights, on the long-tailed labels."""

import contextlib
import dataclasses
from functools import partial

import torch
from torch import nn

from ssnas.config.recipes import shaped
from ssnas.config.schema import Run
from ssnas.finetune import FinetuneResult, fit, latency_ms, pretrain
from ssnas.networks.derived import DerivedNetwork, multiply_adds, parameter_count
from ssnas.networks.factory import start_from_search
from ssnas.pipeline.artifacts import (
    Places,
    save_weights,
    write_csv,
    write_json,
)
from ssnas.pipeline.checks import check_training, check_training_memory
from ssnas.pipeline.lineage import record
from ssnas.pipeline.readers import network_of, read_splits, searched_weights
from ssnas.pipeline.work import identity
from ssnas.runtime.device import choose_device, machine, peak_memory_mb, seed_everything
from ssnas.runtime.distributed import process_group, rank
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData


def finetune(run: Run) -> None:
    """Write the trained network, its figures by epoch, its size and its cost."""
    places, device, config = Places.of(run), choose_device(run.device), run.finetune
    splits, seed = read_splits(run), run.seeds["rows"]
    check_training(config, run.search, splits.train)
    if config.network != "supernet":
        build = partial(network_of, run, splits.train)
        shape = shaped(run.search, len(splits.train), splits.train.images.shape[1])
        check_training_memory(config, shape, build, splits.train, device)
    data = TrainingData.of(splits)
    seed_everything(seed)
    network, weights = network_of(run, splits.train), searched_weights(run)
    inherited = weights is not None and start_from_search(network, config, weights)
    about = identity(run, "network", device)
    folder = places.checkpoint("rows", "finetune")
    before = places.checkpoint("rows", "pretrain")
    with contextlib.ExitStack() as opened:
        opened.enter_context(process_group(device))
        checkpoint = opened.enter_context(Checkpoint(folder / str(rank()), about))
        checkpoints, seconds = [checkpoint], 0.0
        if config.pretrain_epochs:
            pretrained = opened.enter_context(Checkpoint(before / str(rank()), about))
            checkpoints.append(pretrained)
            assert isinstance(network, DerivedNetwork)
            seconds = pretrain(
                network, data, config, run.search, run.views, seed, device, pretrained
            )
        result = fit(network, data, config, seed, device, checkpoint=checkpoint)
        result = dataclasses.replace(result, seconds=result.seconds + seconds)
        if rank() == 0:
            save_weights(places.network, network.state_dict())
            record(run, "network", about)
            _write(run, result, inherited, network, data, device)
        for done in checkpoints:
            done.finish()


def _write(
    run: Run,
    result: FinetuneResult,
    inherited: bool,
    network: nn.Module,
    data: TrainingData,
    device: torch.device,
) -> None:
    places = Places.of(run)
    write_csv(places.metrics("rows", "finetune.csv"), result.history)
    sample = data.normalise(torch.from_numpy(data.val.images[:1]).to(device))
    facts = {
        "parameters": parameter_count(network),
        "multiply_adds": multiply_adds(network, sample),
        "loss": run.finetune.loss,
        "epochs": len(result.history),
        "epoch": result.epoch,
        "network": run.finetune.network,
        "inherited": inherited,
        "pretrain_epochs": run.finetune.pretrain_epochs,
        "scale": run.scale,
        "seed": run.seeds["rows"],
        "dataset": run.data.dataset,
        "image_size": data.train.images.shape[1],
    }
    write_json(places.metrics("rows", "finetune.json"), facts)
    cost = {
        "seconds": round(result.seconds, 1),
        "images_per_second": result.history[-1]["images_per_second"] if result.history else None,
        "latency_ms_per_image": round(latency_ms(network, data.val, data.normalise, device), 3),
        "peak_memory_mb": peak_memory_mb(device),
        **machine(device),
    }
    write_json(places.metrics("rows", "finetune.cost.json"), cost)
