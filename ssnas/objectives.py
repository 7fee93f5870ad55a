"""What a network is trained for: each objective draws its inputs and computes its loss.

`draw` takes a batch of indices, (N, samplers), to tensors on the device; calling the objective
with a model and those tensors gives the loss. A step that needs the loss several times on the same
inputs (second-order search) draws once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssnas import losses
from ssnas.augment import Normalise, crop_and_flip, views
from ssnas.bilateral import BilateralSupernet, bilateral_loss, mixing_ratio
from ssnas.config import Search, Sgd, Views
from ssnas.datasets import Dataset
from ssnas.distributed import gather
from ssnas.runtime import autocast

Criterion = Callable[[Tensor, Tensor, int], Tensor]
"""(logits, targets, epoch) to a loss; epochs count from 0."""


@dataclass(frozen=True)
class Images:
    """What training sees: uint8 images (N, H, W, C) on the device, and how to show them.

    `labels` stay None for the self-supervised objectives.
    """

    pixels: Tensor
    normalise: Normalise
    flip: bool
    labels: Tensor | None = None
    num_classes: int = 0


def images_of(data: Dataset, normalise: Normalise, flip: bool, device: torch.device) -> Images:
    """The images and labels of a data set on the device."""
    pixels, labels = (torch.from_numpy(array).to(device) for array in (data.images, data.labels))
    return Images(pixels, normalise, flip, labels, data.num_classes)


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

    def draw(self, images: Images, batch: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        """Two views of each image, (N, C, H, W)."""
        pixels = images.pixels[batch[:, 0]]
        pair = [views(pixels, random, self.views, images.flip) for _ in range(2)]
        return tuple(images.normalise.standardise(view) for view in pair)

    def forward(
        self, encoder: Callable[[Tensor], Tensor], drawn: tuple[Tensor, ...], epoch: int
    ) -> Tensor:
        embeddings = []
        for view in drawn:
            with autocast(view.device):
                projection = self.projector(encoder(view))
            embeddings.append(gather(projection.float()))
        if self.config.objective == "barlow-twins":
            loss = losses.barlow_twins(*embeddings, lambd=self.config.lambd)
            return self.config.loss_scale * loss
        return losses.nt_xent(*embeddings, temperature=self.config.temperature)


class Supervised(nn.Module):
    """A criterion on the logits of lightly augmented images."""

    def __init__(self, criterion: Criterion, crop_padding: float) -> None:
        super().__init__()
        self.criterion, self.crop_padding = criterion, crop_padding

    def draw(self, images: Images, batch: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        """For each sampler the images, (N, C, H, W), and their labels."""
        padding = round(self.crop_padding * max(images.pixels.shape[1:3]))
        drawn: tuple[Tensor, ...] = ()
        for chosen in batch.T:
            pixels = crop_and_flip(images.pixels[chosen], random, padding, images.flip)
            drawn += (images.normalise(pixels), images.labels[chosen])
        return drawn

    def forward(self, network: nn.Module, drawn: tuple[Tensor, ...], epoch: int) -> Tensor:
        x, targets = drawn
        with autocast(x.device):
            logits = network(x)
        return self.criterion(logits.float(), targets, epoch)


class Bilateral(Supervised):
    """BBN's mixture of two branches, one a sampler (Zhou et al. 2020; H24)."""

    def __init__(self, criterion: Criterion, config: Sgd) -> None:
        super().__init__(criterion, config.crop_padding)
        self.config = config

    def ratio(self, epoch: int) -> float:
        config = self.config
        return mixing_ratio(config.mixing, epoch, config.epochs, config.steepness)

    def forward(self, network: BilateralSupernet, drawn: tuple[Tensor, ...], epoch: int) -> Tensor:
        x_instance, y_instance, x_balanced, y_balanced = drawn
        ratio = self.ratio(epoch)
        with autocast(x_instance.device):
            logits = network.mixed(x_instance, x_balanced, ratio)
        return bilateral_loss(
            logits.float(),
            y_instance,
            y_balanced,
            ratio,
            lambda f, y: self.criterion(f, y, epoch),
        )


def supervised(criterion: Criterion, config: Sgd) -> Supervised:
    """The supervised objective of a sampling scheme."""
    if config.sampling == "bilateral":
        return Bilateral(criterion, config)
    return Supervised(criterion, config.crop_padding)
