"""Training of a network, self-supervised and supervised, and its predictions."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssnas import metrics
from ssnas.config.schema import Finetune, Search, Sgd, Views
from ssnas.data import Dataset
from ssnas.data.sampling import draw_batches
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.losses import make_loss
from ssnas.networks.bilateral import BRANCHES, BilateralSupernet
from ssnas.networks.derived import Network
from ssnas.networks.supernet import Supernet
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import autocast, generator
from ssnas.runtime.distributed import active, agreed
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.objectives import Draws, Images, SelfSupervised, images_of, supervised
from ssnas.training.optimizer import Descent
from ssnas.training.trainer import GeneratorState, Loop

ORDER, CROPS, PRETRAIN_ORDER, PRETRAIN_VIEWS = range(10, 14)
EVALUATION_BATCH = 256
RATIOS = tuple(step / 10 for step in range(11))


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
    """Train the weights of `network`, in place, with SGD, cosine annealing and `config.loss`.

    A supernet's α stay as they are. The network ends with the weights of the last epoch. With
    `early_stop` = k > 0 it ends after k epochs without a better balanced accuracy on the
    validation images (macro AUC for multi-label data), with the weights of the best one.

    Raises:
        InputError: for a loss, sampling scheme or `freeze_backbone` that labels or network do not
            allow, or a loss that is not finite.
    """
    network.to(device)
    criterion = make_loss(
        config.loss,
        train.counts,
        num_images=len(train),
        multi_label=train.multi_label,
        gamma=config.gamma,
        tau=config.tau,
        epochs=config.epochs,
    )
    if (config.sampling == "bilateral") != isinstance(network, BilateralSupernet):
        raise InputError(
            f"finetune.sampling: found {config.sampling!r} for a {type(network).__name__}; a "
            "bilateral supernet, and no other network, is trained with bilateral"
        )
    images = images_of(train, normalise, flip, device)
    descent = Descent(_trained(network, config), config)
    best = BestWeights()

    def finish_epoch(epoch: int) -> dict[str, Any]:
        row: dict[str, Any] = {"learning_rate": descent.learning_rate}
        descent.finish_epoch()
        figures = evaluate(network, val, normalise, device)
        row |= {f"val_{key}": figures[key] for key in _watched(val) if key in figures}
        if config.early_stop:
            always, preferred = (f"val_{key}" for key in _watched(val))
            best.consider(epoch, row.get(preferred, row[always]), network)
            row["stop"] = agreed(epoch - best.epoch >= config.early_stop)
        return row

    loop = _loop(
        name,
        supervised(criterion, config),
        network,
        {"network": network, "best": best},
        lambda: _set_training(network, config),
        images,
        descent,
        config,
        (seed, ORDER, CROPS),
        finish_epoch,
        checkpoint,
    )
    history = loop.run()
    if config.early_stop and history:
        network.load_state_dict(best.weights)
    return Fitted(history, best.epoch if config.early_stop else len(history), loop.seconds)


def pretrain(
    network: Network,
    data: Dataset,
    normalise: Normalise,
    flip: bool,
    config: Finetune,
    search: Search,
    views: Views,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Train the features of `network`, in place, with the search's self-supervised objective.

    SSNAS (Kaplan and Giryes 2020) does so for `pretrain_epochs` before it fine-tunes. No label is
    read.

    Returns:
        The seconds it took.

    Raises:
        InputError: if the search's objective is supervised.
    """
    if search.objective == "supervised":
        raise InputError(
            "finetune.pretrain_epochs: found a supervised search; accepted is 0, or "
            "search.objective barlow-twins or nt-xent"
        )
    sgd = dataclasses.replace(config, epochs=config.pretrain_epochs, sampling="instance")
    objective = SelfSupervised(search, views, network.out_features).to(device)
    network.to(device)
    encoder = [p for name, p in network.named_parameters() if not name.startswith("classifier.")]
    descent = Descent([*encoder, *objective.parameters()], sgd)

    def finish_epoch(epoch: int) -> dict[str, Any]:
        descent.finish_epoch()
        return {}

    loop = _loop(
        "pretrain",
        objective,
        network.features,
        {"network": network, "objective": objective},
        network.train,
        images_of(data, normalise, flip, device),
        descent,
        sgd,
        (seed, PRETRAIN_ORDER, PRETRAIN_VIEWS),
        finish_epoch,
        checkpoint,
    )
    loop.run()
    return loop.seconds


def _loop(
    name: str,
    objective: nn.Module,
    model: Callable[[Tensor], Tensor],
    state: dict[str, Any],
    set_training: Callable[[], Any],
    images: Images,
    descent: Descent,
    config: Sgd,
    streams: tuple[int, int, int],
    finish_epoch: Callable[[int], dict[str, Any]],
    checkpoint: Checkpoint | None,
) -> Loop:
    """The loop that descends on `objective` of `model` by the sampling scheme of `config`."""
    seed, order_stream, view_stream = streams
    count = len(images.pixels)
    order = generator(torch.device("cpu"), seed, order_stream)
    draws = Draws(objective, images, seed, view_stream)
    labels = None if images.labels is None else images.labels.cpu()
    batch_size = min(config.batch_size, count)

    def descend(epoch: int | Tensor, *drawn: Tensor) -> dict[str, Tensor]:
        set_training()
        loss = objective(model, drawn, epoch)
        descent.step(loss)
        return {"loss": loss.detach()}

    # The mixing ratio decides which branches a step computes at all.
    captured = GraphedStep(descend, enabled=config.sampling != "bilateral" and not active())

    def step(batch: Tensor) -> dict[str, Tensor]:
        (drawn,) = draws.of(loop.batches, loop.epoch, loop.done)
        return captured(loop.epoch, *drawn)

    loop = Loop(
        name,
        config.epochs,
        {**state, "descent": descent, "order": GeneratorState(order)},
        lambda: draw_batches([torch.arange(count)], config.sampling, batch_size, order, labels),
        step,
        finish_epoch,
        checkpoint,
    )
    return loop


def _trained(network: nn.Module, config: Finetune) -> list[nn.Parameter]:
    """The parameters that fine-tuning changes: never a supernet's α.

    Raises:
        InputError: if there is no backbone to freeze.
    """
    if config.freeze_backbone:
        if not isinstance(network, BilateralSupernet):
            raise InputError(
                f"finetune.freeze_backbone: found true for a {type(network).__name__}; accepted "
                "is false, or network supernet of a bilateral search"
            )
        frozen = {id(parameter) for parameter in network.backbone_weights()}
        return [parameter for parameter in network.weights() if id(parameter) not in frozen]
    if isinstance(network, Supernet):
        return network.weights()
    return list(network.parameters())


def _set_training(network: nn.Module, config: Finetune) -> None:
    """Training mode; a frozen backbone keeps its batch-norm statistics too."""
    network.train()
    if config.freeze_backbone:
        network.stem.eval()
        network.cells.eval()


def _watched(data: Dataset) -> tuple[str, str]:
    """The validation figures of the history; the second one selects under early stopping."""
    if data.multi_label:
        return "binary_accuracy", "macro_auc"
    return "accuracy", "balanced_accuracy"


def predict(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> np.ndarray:
    """Probabilities (N, C): softmax for single labels, sigmoid for multi-label data.

    Images are shown as they are, and logits are not adjusted.
    """
    network.to(device).eval()
    logits = _logits(network, data, normalise, device)
    return (logits.sigmoid() if data.multi_label else logits.softmax(dim=1)).numpy()


@torch.no_grad()
def _logits(
    forward: Callable[[Tensor], Tensor],
    data: Dataset,
    normalise: Normalise,
    device: torch.device,
) -> Tensor:
    """What `forward` gives for the images, (N, C), on the CPU."""
    parts = []
    for images in torch.from_numpy(data.images).split(EVALUATION_BATCH):
        with autocast(device):
            parts.append(forward(normalise(images.to(device))).float().cpu())
    return torch.cat(parts)


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


def mixing_sweep(
    network: BilateralSupernet, data: Dataset, normalise: Normalise, device: torch.device
) -> list[dict[str, float]]:
    """Accuracy and balanced accuracy at mixing ratios from 0 to 1 in steps of a tenth (H24)."""
    network.to(device).eval()
    instance, balanced = (
        _logits(partial(network.branch, name=name), data, normalise, device) for name in BRANCHES
    )
    sweep = []
    for ratio in RATIOS:
        mixed = (ratio * instance + (1 - ratio) * balanced).softmax(dim=1).numpy()
        found = metrics.single_label(mixed, data.labels)
        kept = {key: found[key] for key in ("accuracy", "balanced_accuracy")}
        sweep.append({"ratio": ratio, **kept})
    return sweep


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
