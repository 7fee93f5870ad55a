"""The losses that a network is trained by, and the inputs that each of them draws.

- Self-supervised: a loss between the embeddings of two random views of each image, one of
  `SELF_SUPERVISED_LOSSES`. Here the Barlow Twins loss enters the search.
- `supervised`: a criterion on the logits of lightly augmented images and their labels.

An objective has two halves. `draw` turns indices of images into tensors on the device; calling the
objective with a model and these tensors gives the loss. So a step that needs the loss several times
on the same inputs (the second-order search) draws once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssnas import losses
from ssnas.config.recipes import sized
from ssnas.config.schema import Finetune, Search, Training, Views
from ssnas.data.types import Dataset
from ssnas.data.views import crop_and_flip, views
from ssnas.engine.batch_norm import Norm
from ssnas.networks.bilateral import BilateralSupernet, bilateral_loss, mixing_ratio
from ssnas.runtime.device import autocast
from ssnas.runtime.distributed import gather
from ssnas.training.images import TrainingImages

Criterion = Callable[[Tensor, Tensor, int | Tensor], Tensor]
"""(logits, targets, epoch) to a loss; the epoch counts from 0, as a tensor in a recorded step."""

EmbeddingLoss = Callable[[Tensor, Tensor, Search], Tensor]
"""Two views' embeddings, (N, D) each, and the settings of the search to a loss."""


def _barlow_twins(z_a: Tensor, z_b: Tensor, config: Search) -> Tensor:
    return config.loss_scale * losses.barlow_twins(z_a, z_b, lambd=config.lambd)


def _nt_xent(z_a: Tensor, z_b: Tensor, config: Search) -> Tensor:
    return losses.nt_xent(z_a, z_b, temperature=config.temperature)


SELF_SUPERVISED_LOSSES: dict[str, EmbeddingLoss] = {
    "barlow-twins": _barlow_twins,
    "nt-xent": _nt_xent,
}
"""The self-supervised losses by name. One more entry is one more objective of the search."""

OBJECTIVES = (*SELF_SUPERVISED_LOSSES, "supervised")
"""The names that `search.objective` accepts."""


class Objective(nn.Module):
    """A loss to minimise; calling it with (model, inputs, epoch) gives the loss.

    The model maps images (N, C, H, W) to features or logits. The epoch counts from 0; it is a
    tensor in a recorded step.
    """

    def draw(
        self, images: TrainingImages, indices: Tensor, random: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Draw the inputs for a batch.

        Args:
            indices: (N, samplers), of the images that each sampler chose.
            random: generator of the images' device.

        Returns:
            Tensors on the device, of N rows each.
        """
        raise NotImplementedError


class SelfSupervised(Objective):
    """One of `SELF_SUPERVISED_LOSSES` between the projections of two random views.

    The projector is that of Barlow Twins (Zbontar et al. 2021), three linear layers of one width.

    Args:
        config: names the loss and gives its settings and the projector's width.
        view_settings: strengths and probabilities of the random views.
        features: length of the vector that the model gives for an image.
    """

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

    def draw(
        self, images: TrainingImages, indices: Tensor, random: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Draw two views of each image, (N, C, H, W) each."""
        pixels = images.pixels[indices[:, 0]]
        pair = [views(pixels, random, self.views, images.flip) for _ in range(2)]
        return tuple(images.normalise.standardise(view) for view in pair)

    def forward(
        self,
        encoder: Callable[[Tensor], Tensor],
        inputs: tuple[Tensor, ...],
        epoch: int | Tensor,
    ) -> Tensor:
        # In one context, within which weights are cast once for both views.
        with autocast(inputs[0].device):
            projections = [self.projector(encoder(view)) for view in inputs]
        z_a, z_b = (gather(projection.float()) for projection in projections)
        return SELF_SUPERVISED_LOSSES[self.config.objective](z_a, z_b, self.config)


class Supervised(Objective):
    """A criterion on the logits of lightly augmented images.

    Args:
        criterion: see `ssnas.losses.make_loss`.
        crop_padding: how far an image is shifted at most, as a share of its longer side.
    """

    def __init__(self, criterion: Criterion, crop_padding: float) -> None:
        super().__init__()
        self.criterion, self.crop_padding = criterion, crop_padding

    def draw(
        self, images: TrainingImages, indices: Tensor, random: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Draw for each sampler the images, (N, C, H, W), and their labels."""
        assert images.labels is not None, "a supervised objective reads labels"
        padding = round(self.crop_padding * max(images.pixels.shape[1:3]))
        inputs: tuple[Tensor, ...] = ()
        for chosen in indices.T:
            pixels = crop_and_flip(images.pixels[chosen], random, padding, images.flip)
            inputs += (images.normalise(pixels), images.labels[chosen])
        return inputs

    def forward(
        self,
        network: Callable[[Tensor], Tensor],
        inputs: tuple[Tensor, ...],
        epoch: int | Tensor,
    ) -> Tensor:
        x, targets = inputs
        with autocast(x.device):
            logits = network(x)
        return self.criterion(gather(logits.float()), gather(targets), epoch)


class Bilateral(Supervised):
    """BBN's mixture of two branches, each with a sampler of its own (Zhou et al. 2020; H24).

    Args:
        criterion: see `ssnas.losses.make_loss`.
        config: gives the schedule of the mixing ratio and the crop's padding.
    """

    def __init__(self, criterion: Criterion, config: Training) -> None:
        super().__init__(criterion, config.crop_padding)
        self.config = config

    def ratio(self, epoch: int) -> float:
        """The mixing ratio of an epoch (from 0): the share of the branch without re-sampling."""
        config = self.config
        return mixing_ratio(config.mixing, epoch, config.epochs, config.steepness)

    # The mixing ratio decides which branches are computed at all, so the step is never recorded,
    # and its epoch is a number.
    def forward(  # type: ignore[override]
        self, network: BilateralSupernet, inputs: tuple[Tensor, ...], epoch: int
    ) -> Tensor:
        x_instance, y_instance, x_balanced, y_balanced = inputs
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


def supervised(criterion: Criterion, config: Training) -> Supervised:
    """Make the supervised objective of a sampling scheme."""
    if config.sampling == "bilateral":
        return Bilateral(criterion, config)
    return Supervised(criterion, config.crop_padding)


def criterion_of(config: Finetune, data: Dataset) -> Criterion:
    """Make the loss `config.loss` for labels as frequent as these.

    Raises:
        InputError: for a loss that these labels do not allow, see `ssnas.losses.make_loss`.
    """
    config = sized(config, len(data))
    return losses.make_loss(
        config.loss,
        data.counts,
        num_images=len(data),
        multi_label=data.multi_label,
        gamma=config.gamma,
        tau=config.tau,
        epochs=config.epochs,
    )
