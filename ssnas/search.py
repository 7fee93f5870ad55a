"""The bilevel architecture search, for every relaxation and objective.

First order (Liu et al. 2019; T21): each step makes one Adam step on α with
ℓ_val + w_01 · ℓ_01, on images that ω is not trained on, and then one SGD step on ω with ℓ_train.
The self-supervised objectives read images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssnas import losses
from ssnas.augment import Normalise, crop_and_flip, views
from ssnas.checkpoint import Checkpoint
from ssnas.config import Search, Views
from ssnas.distributed import average_gradients, gather, rank, shard
from ssnas.errors import InputError
from ssnas.loop import GeneratorState, Loop
from ssnas.metrics import knn_accuracy
from ssnas.runtime import autocast, generator, seed_everything
from ssnas.space import CELL_KINDS, EDGES
from ssnas.supernet import Supernet, frozen_statistics

ALPHA_BETAS = (0.5, 0.999)
DECIDED = (0.15, 0.85)
HALVES, ORDER, VIEWS = range(3)
STREAMS = 100


@dataclass(frozen=True)
class Images:
    """What the search sees: uint8 images (N, H, W, C) on the device, and how to show them.

    `labels` stay None for the self-supervised objectives.
    """

    pixels: Tensor
    normalise: Normalise
    flip: bool
    labels: Tensor | None = None
    num_classes: int = 0


@dataclass(frozen=True)
class Found:
    """The searched supernet, one row of figures an epoch, every w(α) by epoch, and the seconds."""

    supernet: Supernet
    history: list[dict[str, Any]]
    alphas: list[dict[str, Any]]
    seconds: float


class SelfSupervised(nn.Module):
    """Barlow Twins or NT-Xent between the projections of two random views."""

    def __init__(self, config: Search, view_settings: Views, features: int) -> None:
        super().__init__()
        width = config.projector
        self.projector = nn.Sequential(
            nn.Linear(features, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
        )
        self.config, self.views = config, view_settings

    def forward(
        self, supernet: Supernet, images: Images, batch: Tensor, random: torch.Generator
    ) -> Tensor:
        pixels = images.pixels[batch]
        embeddings = []
        for _ in range(2):
            view = views(pixels, random, self.views, images.flip)
            with autocast(pixels.device):
                projection = self.projector(supernet(images.normalise.standardise(view)))
            embeddings.append(gather(projection.float()))
        if self.config.objective == "barlow-twins":
            loss = losses.barlow_twins(*embeddings, lambd=self.config.lambd)
            return self.config.loss_scale * loss
        return losses.nt_xent(*embeddings, temperature=self.config.temperature)


class Supervised(nn.Module):
    """Cross-entropy of a linear classifier, as DARTS and FairDARTS search.

    Raises:
        InputError: if the images come without labels, or with several labels each.
    """

    def __init__(self, config: Search, images: Images, features: int) -> None:
        super().__init__()
        if images.labels is None or images.labels.ndim != 1:
            raise InputError(
                "search.objective: 'supervised' needs one label an image; choose from "
                "barlow-twins, nt-xent"
            )
        self.classifier = nn.Linear(features, images.num_classes)
        self.padding = round(config.crop_padding * max(images.pixels.shape[1:3]))

    def forward(
        self, supernet: Supernet, images: Images, batch: Tensor, random: torch.Generator
    ) -> Tensor:
        pixels = crop_and_flip(images.pixels[batch], random, self.padding, images.flip)
        with autocast(pixels.device):
            logits = self.classifier(supernet(images.normalise(pixels)))
        return nn.functional.cross_entropy(logits.float(), images.labels[batch])


class Bilevel:
    """One step of the bilevel problem, and everything that it changes.

    Args:
        supernet: on the device.
        objective: called with the supernet, the images, a batch of indices and a generator.
        config: optimisers and weights of the losses.
    """

    def __init__(self, supernet: Supernet, objective: nn.Module, config: Search) -> None:
        self.supernet, self.objective, self.config = supernet, objective, config
        self.omega = [*supernet.weights(), *objective.parameters()]
        self.alpha = list(supernet.alphas.values())
        self.omega_optimiser = torch.optim.SGD(
            self.omega,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.alpha_optimiser = torch.optim.Adam(
            self.alpha,
            lr=config.alpha_learning_rate,
            betas=ALPHA_BETAS,
            weight_decay=config.alpha_weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.omega_optimiser, config.epochs, eta_min=config.min_learning_rate
        )

    def state(self) -> dict[str, Any]:
        return {
            "supernet": self.supernet,
            "objective": self.objective,
            "omega_optimiser": self.omega_optimiser,
            "alpha_optimiser": self.alpha_optimiser,
            "schedule": self.schedule,
        }

    def step_alpha(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """One Adam step on α; batch statistics of these images are not recorded."""
        with (
            _without_gradients(self.omega),
            frozen_statistics(self.supernet),
            frozen_statistics(self.objective),
        ):
            value, zero_one = loss(), self.zero_one()
            self.alpha_optimiser.zero_grad()
            (value + self.config.zero_one_weight * zero_one).backward()
        average_gradients(self.alpha)
        self.alpha_optimiser.step()
        return {"loss_alpha": value.detach(), "loss_zero_one": zero_one.detach()}

    def step_omega(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """One SGD step on ω, its gradient clipped to `gradient_clip`."""
        with _without_gradients(self.alpha):
            value = loss()
            self.omega_optimiser.zero_grad()
            value.backward()
        average_gradients(self.omega)
        nn.utils.clip_grad_norm_(self.omega, self.config.gradient_clip)
        self.omega_optimiser.step()
        return {"loss_weights": value.detach()}

    def zero_one(self) -> Tensor:
        """ℓ_01 over all σ(α); nothing under the softmax, whose weights compete already."""
        if self.supernet.relaxation == "softmax":
            return self.alpha[0].new_zeros(())
        weights = torch.cat([w.flatten() for w in self.supernet.architecture().values()])
        return losses.zero_one(weights, self.config.zero_one_norm)


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The backward pass inside skips these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class AlphaLog:
    """Every w(α) after every epoch, as rows of a long table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, epoch: int, supernet: Supernet) -> None:
        for kind, weights in supernet.architecture().items():
            for (source, target), row in zip(EDGES, weights.tolist(), strict=True):
                self.rows += [
                    {
                        "epoch": epoch,
                        "cell": kind,
                        "edge": f"{source}->{target}",
                        "op": op,
                        "weight": weight,
                    }
                    for op, weight in zip(supernet.ops, row, strict=True)
                ]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


def search(
    images: Images,
    config: Search,
    view_settings: Views,
    seed: int,
    monitor: Callable[[Supernet], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Found:
    """Search an architecture for these images.

    Half of the images, drawn once, drive ω, the other half α. The last, short batch of an epoch
    is dropped, since the losses use batch statistics.

    Args:
        monitor: a figure to watch, computed every `knn_every` epochs; the search ignores it.

    Raises:
        InputError: for too few images, or losses that are not finite.
    """
    device = images.pixels.device
    seed_everything(seed)
    supernet = Supernet(
        config.channels,
        config.cells,
        images.pixels.shape[-1],
        config.relaxation,
        config.stem_multiplier,
    )
    objective = (
        Supervised(config, images, supernet.out_features)
        if config.objective == "supervised"
        else SelfSupervised(config, view_settings, supernet.out_features)
    )
    bilevel = Bilevel(supernet.to(device), objective.to(device), config)
    order = generator(torch.device("cpu"), seed, ORDER)
    random = generator(device, seed, VIEWS + STREAMS * rank())
    halves = _halves(len(images.pixels), config.batch_size, seed)
    alphas = AlphaLog()

    def step(batch: Tensor) -> dict[str, Tensor]:
        batch = shard(batch).to(device)
        figures = bilevel.step_alpha(lambda: objective(supernet, images, batch[:, 0], random))
        return figures | bilevel.step_omega(
            lambda: objective(supernet, images, batch[:, 1], random)
        )

    def finish_epoch(epoch: int) -> dict[str, Any]:
        alphas.add(epoch, supernet)
        row = {"learning_rate": bilevel.schedule.get_last_lr()[0], **_decisions(supernet)}
        if monitor and config.knn_every and epoch % config.knn_every == 0:
            row["knn_accuracy"] = monitor(supernet)
        bilevel.schedule.step()
        return row

    loop = Loop(
        "search",
        config.epochs,
        {
            **bilevel.state(),
            "alphas": alphas,
            "order": GeneratorState(order),
            "random": GeneratorState(random),
        },
        lambda: _draw_batches(halves, config.batch_size, order),
        step,
        finish_epoch,
        checkpoint,
    )
    history = loop.run()
    return Found(supernet, history, alphas.rows, loop.seconds)


def _halves(count: int, batch_size: int, seed: int) -> Tensor:
    """Indices (N/2, 2): the images of α and those of ω, disjoint."""
    half = count // 2
    if half < batch_size:
        raise InputError(
            f"search.batch_size: found {batch_size}, but half of the {count} training images is "
            f"{half}; accepted is at most {half}"
        )
    permutation = torch.randperm(count, generator=generator(torch.device("cpu"), seed, HALVES))
    return permutation[: 2 * half].view(2, half).T


def _draw_batches(halves: Tensor, batch_size: int, order: torch.Generator) -> Tensor:
    """Shuffled batches (steps, batch, 2): column 0 for α, column 1 for ω."""
    columns = [half[torch.randperm(len(half), generator=order)] for half in halves.T]
    steps = len(halves) // batch_size
    return torch.stack(columns, dim=1)[: steps * batch_size].view(steps, batch_size, 2)


def _decisions(supernet: Supernet) -> dict[str, float]:
    """How many edges prefer the skip connection, and which share of all w(α) is near 0 or 1."""
    architecture = {kind: w.detach() for kind, w in supernet.architecture().items()}
    skip = supernet.ops.index("skip_connect")
    row: dict[str, float] = {
        f"skip_{kind}": int((architecture[kind].argmax(dim=1) == skip).sum()) for kind in CELL_KINDS
    }
    weights = torch.cat([w.flatten() for w in architecture.values()])
    low, high = DECIDED
    row["decided"] = float(((weights < low) | (weights > high)).float().mean())
    return row


@torch.no_grad()
def encode(supernet: Supernet, images: Tensor, normalise: Normalise, batch: int = 256) -> Tensor:
    """Features (N, out_features) of uint8 images (N, H, W, C), without augmentation."""
    training = supernet.training
    supernet.eval()
    try:
        parts = []
        for chunk in images.split(batch):
            with autocast(images.device):
                parts.append(supernet(normalise(chunk)).float())
        return torch.cat(parts)
    finally:
        supernet.train(training)


def knn_monitor(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], normalise: Normalise
) -> Callable[[Supernet], float]:
    """k-nearest-neighbour accuracy on the validation images: (images, labels) of both splits."""

    def monitor(supernet: Supernet) -> float:
        features = [encode(supernet, images, normalise) for images, _ in (train, val)]
        return knn_accuracy(features[0], train[1], features[1], val[1])

    return monitor
