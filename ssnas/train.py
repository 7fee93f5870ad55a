"""Supervised training of a network, and its predictions."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssnas import metrics
from ssnas.augment import Normalise, crop_and_flip
from ssnas.checkpoint import Checkpoint
from ssnas.config import Finetune
from ssnas.datasets import Dataset
from ssnas.distributed import average_gradients, rank, shard
from ssnas.loop import GeneratorState, Loop
from ssnas.losses import make_loss
from ssnas.runtime import autocast, generator

ORDER, CROPS = 10, 11
STREAMS = 100
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Fitted:
    """One row of figures an epoch, the epoch whose weights the network has, and the seconds."""

    history: list[dict[str, Any]]
    epoch: int
    seconds: float


class BestWeights:
    """The weights of the best epoch so far by a validation figure, and its age."""

    def __init__(self) -> None:
        self.epoch, self.figure, self.weights = 0, float("-inf"), {}

    def consider(self, epoch: int, figure: float, network: nn.Module) -> None:
        if figure > self.figure:
            self.epoch, self.figure = epoch, figure
            self.weights = copy.deepcopy(network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "figure": self.figure, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.figure, self.weights = state["epoch"], state["figure"], state["weights"]


def fit(
    network: nn.Module,
    train: Dataset,
    val: Dataset,
    normalise: Normalise,
    flip: bool,
    config: Finetune,
    seed: int,
    device: torch.device,
    name: str = "finetune",
    checkpoint: Checkpoint | None = None,
) -> Fitted:
    """Train all weights of `network`, in place, with SGD, cosine annealing and `config.loss`.

    It ends with the weights of the last epoch. With `early_stop` = k > 0 it ends after k epochs
    without a better balanced accuracy on the validation images (macro AUC for multi-label data),
    with the weights of the best one.

    Raises:
        InputError: for a loss that the labels do not allow, or one that is not finite.
    """
    network.to(device)
    batch_size = min(config.batch_size, len(train))
    criterion = make_loss(
        config.loss,
        train.counts,
        num_images=len(train),
        multi_label=train.multi_label,
        gamma=config.gamma,
        tau=config.tau,
        epochs=config.epochs,
    )
    pixels, labels = on_device(train, device)
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, config.epochs, eta_min=config.min_learning_rate
    )
    order = generator(torch.device("cpu"), seed, ORDER)
    random = generator(device, seed, CROPS + STREAMS * rank())
    best = BestWeights()
    padding = round(config.crop_padding * max(pixels.shape[1:3]))
    parameters = list(network.parameters())

    def draw_batches() -> Tensor:
        steps = len(pixels) // batch_size
        permutation = torch.randperm(len(pixels), generator=order)
        return permutation[: steps * batch_size].view(steps, batch_size)

    def step(batch: Tensor) -> dict[str, Tensor]:
        batch = shard(batch).to(device)
        network.train()
        x = normalise(crop_and_flip(pixels[batch], random, padding, flip))
        with autocast(device):
            logits = network(x)
        loss = criterion(logits.float(), labels[batch], len(loop.history))
        optimiser.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimiser.step()
        return {"loss": loss.detach()}

    def finish_epoch(epoch: int) -> dict[str, Any]:
        row: dict[str, Any] = {"learning_rate": schedule.get_last_lr()[0]}
        schedule.step()
        figures = evaluate(network, val, normalise, device)
        row |= {f"val_{key}": figures[key] for key in _watched(val) if key in figures}
        if config.early_stop:
            always, preferred = (f"val_{key}" for key in _watched(val))
            best.consider(epoch, row.get(preferred, row[always]), network)
            row["stop"] = epoch - best.epoch >= config.early_stop
        return row

    loop = Loop(
        name,
        config.epochs,
        {
            "network": network,
            "optimiser": optimiser,
            "schedule": schedule,
            "order": GeneratorState(order),
            "random": GeneratorState(random),
            "best": best,
        },
        draw_batches,
        step,
        finish_epoch,
        checkpoint,
    )
    history = loop.run()
    if config.early_stop:
        network.load_state_dict(best.weights)
    return Fitted(history, best.epoch if config.early_stop else len(history), loop.seconds)


def _watched(data: Dataset) -> tuple[str, str]:
    """The validation figures of the history; the second one selects under early stopping."""
    if data.multi_label:
        return "binary_accuracy", "macro_auc"
    return "accuracy", "balanced_accuracy"


def on_device(data: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, H, W, C), and labels on the device."""
    return torch.from_numpy(data.images).to(device), torch.from_numpy(data.labels).to(device)


@torch.no_grad()
def predict(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> np.ndarray:
    """Probabilities (N, C): softmax for single labels, sigmoid for multi-label data.

    Images are shown as they are, and logits are not adjusted.
    """
    network.to(device).eval()
    parts = []
    for images in torch.from_numpy(data.images).split(EVALUATION_BATCH):
        with autocast(device):
            logits = network(normalise(images.to(device))).float()
        parts.append(logits.sigmoid() if data.multi_label else logits.softmax(dim=1))
    return torch.cat(parts).cpu().numpy()


def evaluate(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> dict[str, float]:
    """The figures of `ssnas.metrics` on these images."""
    return figures(predict(network, data, normalise, device), data)


def figures(
    probabilities: np.ndarray, data: Dataset, train_counts: list[int] | None = None
) -> dict[str, float]:
    """The figures that fit the kind of labels."""
    if data.multi_label:
        return metrics.multi_label(probabilities, data.labels)
    return metrics.single_label(probabilities, data.labels, train_counts)


@torch.no_grad()
def latency_ms(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> float:
    """Milliseconds an image, predicting in batches: the median of five passes over one batch."""
    few = data.take(np.arange(min(len(data), EVALUATION_BATCH)))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        predict(network, few, normalise, device)
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds)) / len(few)
