"""Search the supernet on the long-tailed training images; their labels only monitor it."""

import dataclasses

import torch

from ssnas.config.recipes import shaped
from ssnas.config.schema import Run
from ssnas.data.types import Dataset, Splits
from ssnas.data.views import Normalise
from ssnas.pipeline.artifacts import (
    Places,
    save_weights,
    write_csv,
    write_json,
)
from ssnas.pipeline.checks import check_search_memory, check_training
from ssnas.pipeline.lineage import record
from ssnas.pipeline.readers import read_splits
from ssnas.pipeline.work import identity
from ssnas.runtime.device import choose_device, machine, peak_memory_mb
from ssnas.runtime.distributed import process_group, rank
from ssnas.runtime.mapped import joined, spread
from ssnas.search import SearchResult, search
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingImages
from ssnas.training.monitor import knn_monitor

MONITORED = 50_000


def run_search(run: Run) -> None:
    """Write the searched supernet, and α and the losses by epoch."""
    places, device = Places.of(run), choose_device(run.device)
    splits = read_splits(run)
    settings = shaped(run.search, len(splits.train), splits.train.images.shape[1])
    if "rows" in run.folders:  # what would otherwise end the run after the search
        check_training(run.finetune, run.search, splits.train)
    check_search_memory(settings, splits.train, device)
    images, monitor = images_of(run, splits, device), None
    if not splits.train.multi_label:
        labelled = (
            TrainingImages.of(sample, images.normalise, images.flip, device)
            for sample in (_sample(splits.train), _sample(splits.val))
        )
        monitor = knn_monitor(*labelled)
    about = identity(run, "supernet", device)
    folder = places.checkpoint("searches", "search")
    with process_group(device), Checkpoint(folder / str(rank()), about) as checkpoint:
        result = search(
            images,
            settings,
            run.views,
            run.seeds["searches"],
            monitor=monitor,
            checkpoint=checkpoint,
        )
        if rank() == 0:
            save_weights(places.supernet, result.supernet.state_dict())
            record(run, "supernet", about)
            _write(result, places, device)
        checkpoint.finish()


def _sample(data: Dataset) -> Dataset:
    """Take at most `MONITORED` images: neighbours among more would take longer than the search."""
    return data if len(data) <= MONITORED else data.take(spread(len(data), MONITORED))


def images_of(run: Run, splits: Splits, device: torch.device) -> TrainingImages:
    """The images that the search sees: without labels, unless its objective reads them."""
    normalise = Normalise.of(splits.train.images)
    images = TrainingImages.of(splits.train, normalise, splits.flip, device)
    if run.search.objective == "supervised":
        return images
    if splits.unlabelled is None:
        return dataclasses.replace(images, labels=None)
    every = joined(splits.train.images, splits.unlabelled)
    return TrainingImages(torch.from_numpy(every).to(device), normalise, splits.flip, file=every)


def _write(result: SearchResult, places: Places, device: torch.device) -> None:
    write_csv(places.metrics("searches", "search.csv"), result.history)
    write_csv(places.metrics("searches", "alpha.csv"), result.alphas)
    cost = {
        "seconds": round(result.seconds, 1),
        "images_per_second": result.history[-1]["images_per_second"] if result.history else None,
        "peak_memory_mb": peak_memory_mb(device),
        **machine(device),
    }
    write_json(places.metrics("searches", "search.cost.json"), cost)
