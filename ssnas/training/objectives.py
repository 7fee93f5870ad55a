"""What a network is trained for: each objective draws its inputs and computes its loss.

`draw` takes indices, (N, samplers), to tensors on the device, N rows each; calling the objective
with a model and those of a batch gives the loss. A step that needs the loss several times on the
same inputs (second-order search) draws once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssnas import losses
from ssnas.config.schema import Search, Sgd, Views
from ssnas.data import Dataset
from ssnas.data.views import Normalise, crop_and_flip, views
from ssnas.engine.batch_norm import Norm
from ssnas.networks.bilateral import BilateralSupernet, bilateral_loss, mixing_ratio
from ssnas.runtime.device import autocast, generator
from ssnas.runtime.distributed import gather, shard

BLOCK_PIXELS = 2**20
OBJECTIVES = ("barlow-twins", "nt-xent", "supervised")

Criterion = Callable[[Tensor, Tensor, int | Tensor], Tensor]
"""(logits, targets, epoch) to a loss; epochs count from 0, as a tensor where a step is captured."""


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


class Draws:
    """What `objective` draws for each step, in blocks of several steps.

    A view is many small kernels, and as many for one image as for thousands: an accelerator gets
    through them once a block. Every block has a random generator of its own, named by what it is
    for, so a training that goes on in the middle of a block draws the same again. The block's size
    follows from that of the batches and images alone.

    Args:
        seed, stream: of the random numbers.
    """

    def __init__(self, objective: nn.Module, images: Images, seed: int, stream: int) -> None:
        self.objective, self.images = objective, images
        self.seeds = seed, stream
        self._epoch: int | None = None
        self._block: int | None = None

    def of(self, batches: Tensor, epoch: int, step: int) -> list[tuple[Tensor, ...]]:
        """For each part of the step's batch (see `sampling.draw_batches`) what is drawn.

        Args:
            batches: of the epoch, (steps, batch, parts, samplers).
        """
        if epoch != self._epoch:
            # One copy from the host an epoch, since each makes an accelerator wait.
            self._indices = batches.to(self.images.pixels.device)
            self._epoch, self._block = epoch, None
        pixels = batches[0].numel() * self.images.pixels[0, ..., 0].numel()
        steps = max(1, BLOCK_PIXELS // pixels)
        block, position = divmod(step, steps)
        if block != self._block:
            self._drawn = self._draw(self._indices[block * steps :][:steps], block)
            self._block = block
        return [
            tuple(drawn[position, part] for drawn in self._drawn)
            for part in range(batches.shape[2])
        ]

    def _draw(self, block: Tensor, number: int) -> list[Tensor]:
        """Each of the objective's tensors for all steps, (steps, parts, batch, …).

        Every process draws for whole batches, so that their number changes nothing, and keeps its
        own rows.
        """
        whole = block.transpose(1, 2)
        random = generator(block.device, *self.seeds, self._epoch, number)
        drawn = self.objective.draw(self.images, whole.flatten(0, 2), random)
        drawn = [tensor.unflatten(0, whole.shape[:3]) for tensor in drawn]
        return [shard(tensor.movedim(2, 0)).movedim(0, 2) for tensor in drawn]


class SelfSupervised(nn.Module):
    """Barlow Twins or NT-Xent between the projections of two random views."""

    def __init__(self, config: Search, view_settings: Views, features: int) -> None:
        super().__init__()
        width = config.projector
        self.projector = nn.Sequential(
            nn.Linear(features, width, bias=False),
            Norm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            Norm(width),
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
        self,
        encoder: Callable[[Tensor], Tensor],
        drawn: tuple[Tensor, ...],
        epoch: int | Tensor,
    ) -> Tensor:
        # In one context, within which weights are cast once for both views.
        with autocast(drawn[0].device):
            projections = [self.projector(encoder(view)) for view in drawn]
        embeddings = [gather(projection.float()) for projection in projections]
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

    def forward(self, network: nn.Module, drawn: tuple[Tensor, ...], epoch: int | Tensor) -> Tensor:
        x, targets = drawn
        with autocast(x.device):
            logits = network(x)
        return self.criterion(gather(logits.float()), gather(targets), epoch)


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
            gather(logits.float()),
            gather(y_instance),
            gather(y_balanced),
            ratio,
            lambda f, y: self.criterion(f, y, epoch),
        )


def supervised(criterion: Criterion, config: Sgd) -> Supervised:
    """The supervised objective of a sampling scheme."""
    if config.sampling == "bilateral":
        return Bilateral(criterion, config)
    return Supervised(criterion, config.crop_padding)
