"""Training of a network, self-supervised or by labels, and its predictions.

`fit` minimises the loss of the long-tailed labels over the weights, `pretrain` the search's
self-supervised loss; both descend as the search does on ω. `logits_of` gives a network's logits,
`predict` the published probabilities, and `evaluate` their figures.
"""

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
from ssnas.config.recipes import sized
from ssnas.config.schema import Finetune, Search, Views
from ssnas.data.types import Dataset
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.networks.bilateral import BRANCHES, BilateralSupernet
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.supernet import Supernet
from ssnas.runtime.cuda_graph import GraphedStep
from ssnas.runtime.device import autocast
from ssnas.runtime.distributed import active, agreed
from ssnas.runtime.mapped import release
from ssnas.training.batches import BatchStream
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData, TrainingImages
from ssnas.training.objectives import (
    SELF_SUPERVISED_LOSSES,
    Objective,
    SelfSupervised,
    criterion_of,
    supervised,
)
from ssnas.training.optimizer import Descent
from ssnas.training.trainer import Trainer, seconds_a_step

ORDER, CROPS, PRETRAIN_ORDER, PRETRAIN_VIEWS = range(10, 14)
"""The random streams of the trainings, see `ssnas.runtime.device.generator`."""

EVALUATION_BATCH = 256
RATIOS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class FinetuneResult:
    """The end of a training by labels.

    Attributes:
        history: one row of figures an epoch.
        epoch: the epoch, from 1, whose weights the network has.
        seconds: that the training took.
    """

    history: list[dict[str, Any]]
    epoch: int
    seconds: float


class BestWeights:
    """The weights of the epoch that is best by a validation figure so far."""

    def __init__(self) -> None:
        self.epoch, self.figure = 0, float("-inf")
        self.weights: dict[str, Tensor] = {}

    def consider(self, epoch: int, figure: float, network: nn.Module) -> None:
        """Keep a copy of the network's weights if the figure is better than all before."""
        if figure > self.figure:
            self.epoch, self.figure = epoch, figure
            self.weights = copy.deepcopy(network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "figure": self.figure, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.figure, self.weights = state["epoch"], state["figure"], state["weights"]


class WeightAverage:
    """The mean of the weights over the last steps of a training (Izmailov et al. 2018).

    Args:
        parameters: that are trained.
        start: the number of the first step, from 0, whose weights count.
    """

    def __init__(self, parameters: list[nn.Parameter], start: int) -> None:
        self.parameters, self.start = parameters, start
        self.count = 0
        self.means: list[Tensor] = []

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Let the weights after a step count, unless it is before the start."""
        if step < self.start:
            return
        self.count += 1
        if self.means:
            torch._foreach_lerp_(self.means, list[Tensor](self.parameters), 1 / self.count)
        else:
            self.means = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their means."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.means = state["count"], state["means"]


def fit(
    network: nn.Module,
    data: TrainingData,
    config: Finetune,
    seed: int,
    device: torch.device,
    name: str = "finetune",
    checkpoint: Checkpoint | None = None,
) -> FinetuneResult:
    """Train the weights of a network, in place, by labels and with `config.loss`.

    A supernet's α stay as they are. The network ends with the weights of the last epoch, or with
    their mean over the last steps (`averaging`). With `early_stop` = k > 0 the training ends after
    k epochs without a better balanced accuracy on the validation images (macro AUC for multi-label
    data), and the network has the weights of the best epoch.

    Args:
        network: gives logits (N, C) for images (N, C_in, H, W).
        data: images to train on, and to validate on after each epoch.
        config: the loss, the sampling scheme and the optimiser.
        seed: of the batches and their augmentation.
        device: to train on; the network stays there.
        name: of the training, in messages.
        checkpoint: to resume from and to save to.

    Raises:
        InputError: for a loss, sampling scheme or `freeze_backbone` that labels or network do not
            allow, or a loss that is not finite.

    Example:
        Any module that gives logits can be trained, here on four black and four white images:

        >>> pixels = np.repeat(np.array([0, 255], np.uint8), 4 * 16).reshape(8, 4, 4, 1)
        >>> images = Dataset(pixels, np.repeat([0, 1], 4), ("black", "white"))
        >>> data = TrainingData(images, images, Normalise.of(pixels), flip=False)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> settings, cpu = Finetune(epochs=5, batch_size=4), torch.device("cpu")
        >>> result = fit(network, data, settings, seed=0, device=cpu)
        >>> len(result.history), result.epoch
        (5, 5)
        >>> predict(network, images, data.normalise, cpu).argmax(axis=1).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    network.to(device)
    config = sized(config, len(data.train))
    objective = _supervised_objective(network, data.train, config)
    images = TrainingImages.of(data.train, data.normalise, data.flip, device)
    stream = BatchStream(objective, images, config, (seed, ORDER), (seed, CROPS))
    trained = _trained(network, config)
    descent = Descent(trained, config, stream.steps)
    best, steps = BestWeights(), config.epochs * stream.steps
    average = WeightAverage(trained, steps - round(config.averaging * steps))

    def set_training() -> None:
        _set_training(network, config)

    def finish_epoch(epoch: int) -> dict[str, Any]:
        row: dict[str, Any] = {"learning_rate": descent.learning_rate}
        measured = evaluate(network, data.val, data.normalise, device)
        watched = _watched(data.val)
        row |= {f"val_{key}": measured[key] for key in watched if key in measured}
        if config.early_stop:
            always, preferred = (f"val_{key}" for key in watched)
            best.consider(epoch, row.get(preferred, row[always]), network)
            row["stop"] = agreed(epoch - best.epoch >= config.early_stop)
        return row

    trainer = Trainer(
        name,
        config.epochs,
        {
            "network": network,
            "best": best,
            "descent": descent,
            "average": average,
            "order": stream,
        },
        stream.draw_epoch,
        _step(network, set_training, objective, descent, stream, average),
        finish_epoch,
        checkpoint,
    )
    history = trainer.run()
    if config.early_stop and history:
        network.load_state_dict(best.weights)
    elif average.count:
        average.apply()
        set_training()
        _record_statistics(network, stream, config.epochs)
    last = best.epoch if config.early_stop else len(history)
    return FinetuneResult(history, last, trainer.seconds)


def epoch_seconds(
    network: nn.Module, data: TrainingData, config: Finetune, device: torch.device
) -> float:
    """Measure how long an epoch of `fit` takes, by a few steps of a copy of the network.

    Args: as those of `fit`.

    Returns:
        The seconds of an epoch, its validation included.
    """
    config = sized(config, len(data.train))
    twin = copy.deepcopy(network).to(device)
    images = TrainingImages.of(data.train, data.normalise, data.flip, device)
    stream = BatchStream(
        _supervised_objective(twin, data.train, config), images, config, (0, ORDER), (0, CROPS)
    )
    descent = Descent(_trained(twin, config), config, stream.steps)
    step = _step(twin, lambda: _set_training(twin, config), stream.objective, descent, stream)
    batches = stream.draw_epoch()
    seconds = seconds_a_step(lambda number: step(batches, 0, number), len(batches))
    validation = latency_ms(twin, data.val, data.normalise, device) / 1000 * len(data.val)
    return seconds * stream.steps + validation


def pretrain(
    network: DerivedNetwork,
    data: TrainingData,
    config: Finetune,
    search: Search,
    views: Views,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> float:
    """Train the features of a network, in place, with the search's self-supervised objective.

    SSNAS (Kaplan and Giryes 2020) does so for `pretrain_epochs` before it fine-tunes. No label is
    read, and the classifier stays as it is.

    Args:
        network: a derived network.
        data: the images to train on; the validation images are not used.
        config: the optimiser, the batch size and `pretrain_epochs`.
        search: the settings of the objective.
        views: strengths and probabilities of the random views.
        seed: of the batches and views.
        device: to train on; the network stays there.
        checkpoint: to resume from and to save to.

    Returns:
        The seconds it took.

    Raises:
        InputError: if the search's objective is supervised, or a loss is not finite.
    """
    if search.objective not in SELF_SUPERVISED_LOSSES:
        raise InputError(
            f"finetune.pretrain_epochs: found a {search.objective} search; accepted is 0, or "
            f"search.objective {' or '.join(SELF_SUPERVISED_LOSSES)}"
        )
    config = sized(config, len(data.train))
    settings = dataclasses.replace(config, epochs=config.pretrain_epochs, sampling="instance")
    objective = SelfSupervised(search, views, network.out_features).to(device)
    network.to(device)
    encoder = [p for name, p in network.named_parameters() if not name.startswith("classifier.")]
    images = TrainingImages.of(data.train, data.normalise, data.flip, device)
    stream = BatchStream(
        objective, images, settings, (seed, PRETRAIN_ORDER), (seed, PRETRAIN_VIEWS)
    )
    descent = Descent([*encoder, *objective.parameters()], settings, stream.steps)
    trainer = Trainer(
        "pretrain",
        settings.epochs,
        {"network": network, "objective": objective, "descent": descent, "order": stream},
        stream.draw_epoch,
        _step(network.features, network.train, objective, descent, stream),
        lambda epoch: {},
        checkpoint,
    )
    trainer.run()
    return trainer.seconds


def _supervised_objective(network: nn.Module, train: Dataset, config: Finetune) -> Objective:
    """Make the loss `config.loss` of these labels' counts, by the network's sampling scheme.

    Raises:
        InputError: for a loss that the labels, or a sampling scheme that the network does not
            allow.
    """
    criterion = criterion_of(config, train)
    if (config.sampling == "bilateral") != isinstance(network, BilateralSupernet):
        raise InputError(
            f"finetune.sampling: found {config.sampling!r} for a {type(network).__name__}; a "
            "bilateral supernet, and no other network, is trained with bilateral"
        )
    return supervised(criterion, config)


@torch.no_grad()
def _record_statistics(network: nn.Module, stream: BatchStream, epoch: int) -> None:
    """Let batch norms see an epoch of images, for weights that were not trained in this place."""
    batches = stream.draw_epoch()
    for number in range(len(batches)):
        (inputs,) = stream.inputs(batches, epoch, number)
        with autocast(inputs[0].device):
            network(inputs[0])


def _step(
    model: Callable[[Tensor], Tensor],
    set_training: Callable[[], object],
    objective: Objective,
    descent: Descent,
    stream: BatchStream,
    average: WeightAverage | None = None,
) -> Callable[[Tensor, int, int], dict[str, Tensor]]:
    """Make the step of a `Trainer` that descends on the objective of a model.

    Args:
        model: gives the features or logits that the objective reads.
        set_training: puts the network into training mode, which validation ends.
        average: of the weights, which each step is added to.
    """

    def descend(epoch: int | Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        set_training()
        loss = objective(model, inputs, epoch)
        descent.step(loss)
        return {"loss": loss.detach()}

    # The mixing ratio decides which branches a step computes at all.
    graphed = GraphedStep(descend, enabled=stream.sampling != "bilateral" and not active())

    def step(batches: Tensor, epoch: int, number: int) -> dict[str, Tensor]:
        (inputs,) = stream.inputs(batches, epoch, number)
        descent.schedule(epoch, number)
        figures = graphed(epoch, *inputs)
        if average is not None:
            average.add(epoch * len(batches) + number)
        return figures

    return step


def _trained(network: nn.Module, config: Finetune) -> list[nn.Parameter]:
    """List the parameters that `fit` trains: all but a supernet's α and a frozen backbone.

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
    """Set training mode; a frozen backbone keeps its batch-norm statistics too."""
    network.train()
    if config.freeze_backbone and isinstance(network, BilateralSupernet):
        network.stem.eval()
        network.cells.eval()


def _watched(data: Dataset) -> tuple[str, str]:
    """Name the validation figures of the history; the second one decides on early stopping."""
    if data.multi_label:
        return "binary_accuracy", "macro_auc"
    return "accuracy", "balanced_accuracy"


def predict(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> np.ndarray:
    """Predict probabilities (N, C) as published: the softmax of the logits, or their sigmoid.

    Logits are not adjusted. `ssnas.decision` has the other decisions.

    Args: as those of `logits_of`; that images have several labels decides on the sigmoid.
    """
    logits = logits_of(network, data, normalise, device)
    return (logits.sigmoid() if data.multi_label else logits.softmax(dim=1)).numpy()


def logits_of(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> Tensor:
    """Compute the logits (N, C) of all images, shown as they are, and return them on the CPU.

    Args:
        network: gives logits (N, C); it moves to the device and to evaluation mode.
        data: its labels are not read.
        normalise: as in training.
    """
    network.to(device).eval()
    return _logits(network, data, normalise, device)


@torch.no_grad()
def _logits(
    forward: Callable[[Tensor], Tensor],
    data: Dataset,
    normalise: Normalise,
    device: torch.device,
) -> Tensor:
    batches = []
    for images in torch.from_numpy(data.images).split(EVALUATION_BATCH):
        with autocast(device):
            batches.append(forward(normalise(images.to(device))).float().cpu())
        release(data.images)
    return torch.cat(batches)


def evaluate(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> dict[str, float]:
    """Measure a network on labelled images by its published decision, see `metrics.figures`."""
    return metrics.figures(predict(network, data, normalise, device), data.labels)


def mixing_sweep(
    network: BilateralSupernet, data: Dataset, normalise: Normalise, device: torch.device
) -> list[dict[str, float]]:
    """Measure accuracy and balanced accuracy at mixing ratios 0, 0.1, … 1 (H24).

    Returns:
        For each ratio a row of `ratio`, `accuracy` and `balanced_accuracy`.
    """
    network.to(device).eval()
    instance, balanced = (
        _logits(partial(network.branch, name=name), data, normalise, device) for name in BRANCHES
    )
    sweep = []
    for ratio in RATIOS:
        mixed = (ratio * instance + (1 - ratio) * balanced).softmax(dim=1).numpy()
        measured = metrics.single_label(mixed, data.labels)
        accuracies = {key: measured[key] for key in ("accuracy", "balanced_accuracy")}
        sweep.append({"ratio": ratio, **accuracies})
    return sweep


@torch.no_grad()
def latency_ms(
    network: nn.Module, data: Dataset, normalise: Normalise, device: torch.device
) -> float:
    """Measure the milliseconds an image: the median of five predictions of one batch."""
    batch = data.take(np.arange(min(len(data), EVALUATION_BATCH)))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        predict(network, batch, normalise, device)
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds)) / len(batch)
