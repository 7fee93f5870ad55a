"""Random views of images: one drawing a sample, in whole batches on the images' device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssnas.config.schema import Views
from ssnas.runtime.device import constant
from ssnas.runtime.mapped import chunks

STATISTICS_CHUNK = 2**20

LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in a grey value (ITU-R 601)."""

ASPECT_RATIO = 4 / 3
"""The widest crop, width over height; the narrowest is its inverse."""

CROSS = ((0, -1, 1), (1, 0, -1), (-1, 1, 0))
"""The matrix of the cross product with (1, 1, 1)."""


@dataclass(frozen=True)
class Normalise:
    """Map uint8 images (N, H, W, C) to float ones (N, C, H, W) of zero mean and unit variance.

    Attributes:
        mean: of each of the C channels over the training images, in [0, 1].
        std: their standard deviation likewise.

    Example:
        >>> images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        >>> normalise = Normalise.of(images)
        >>> normalise
        Normalise(mean=(0.5,), std=(0.5,))
        >>> normalise(torch.from_numpy(images)).flatten()
        tensor([-1.,  1.])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: np.ndarray) -> Normalise:
        """Take the statistics of uint8 images (N, H, W, C); constant channels are not scaled."""
        # Counting values needs no copy of the images in floating point.
        counts = np.zeros((images.shape[-1], 256), np.int64)
        for part in chunks(images, STATISTICS_CHUNK):
            for channel, count in enumerate(counts):
                count += np.bincount(images[part][..., channel].ravel(), minlength=256)
        values, total = np.arange(256), counts[0].sum()
        mean = counts @ values / total
        std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(axis=1) / total)
        return cls(
            tuple(map(float, mean / 255)), tuple(float(s) if s > 0 else 1.0 for s in std / 255)
        )

    def __call__(self, images: Tensor) -> Tensor:
        return self.standardise(unit(images))

    def standardise(self, x: Tensor) -> Tensor:
        """Standardise float images (N, C, H, W) in [0, 1]."""
        mean, std = (constant(values, x).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


def unit(images: Tensor) -> Tensor:
    """Map uint8 images (N, H, W, C) to float ones (N, C, H, W) in [0, 1].

    Example:
        >>> unit(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1))
        tensor([[[[0., 1.]]]])
    """
    return images.permute(0, 3, 1, 2).float() / 255


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Shift and mirror each image at random, the light augmentation of supervised training.

    Args:
        images: uint8 (N, H, W, C).
        generator: of the images' device.
        padding: the largest shift in either direction, in pixels; zeros enter at the border.
        flip: whether to mirror each image left to right with probability ½.

    Returns:
        uint8 (N, H, W, C).

    Example:
        >>> images = torch.full((1, 3, 3, 1), 7, dtype=torch.uint8)
        >>> crop_and_flip(images, torch.Generator().manual_seed(0), 1, flip=True).shape
        torch.Size([1, 3, 3, 1])
        >>> crop_and_flip(images, torch.Generator(), padding=0, flip=False).equal(images)
        True
    """
    n, height, width, _ = images.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator, device=images.device)
    rows = torch.arange(height, device=images.device) + shifts[0]
    columns = torch.arange(width, device=images.device) + shifts[1]
    if flip:
        mirrored = torch.rand((n, 1), generator=generator, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[sample, rows.unsqueeze(2), columns.unsqueeze(1)]


def views(images: Tensor, generator: torch.Generator, settings: Views, flip: bool) -> Tensor:
    """Draw one random view of each image for the self-supervised objectives (Chen et al. 2020).

    A view is a random resized crop, mirrored at random, with colour jitter (brightness, contrast,
    saturation, hue, in this order) and conversion to grey, each with a probability. Saturation,
    hue and grey apply to colour images alone. There is no blur, as is customary for images of 32
    pixels.

    Args:
        images: uint8 (N, H, W, C).
        generator: of the images' device.
        settings: strengths and probabilities.
        flip: whether to mirror each view left to right with probability ½.

    Returns:
        Float (N, C, H, W) in [0, 1].

    Example:
        >>> images = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
        >>> views(images, torch.Generator().manual_seed(0), Views(), flip=True).shape
        torch.Size([2, 3, 8, 8])
    """
    x = _resized_crop(unit(images), generator, settings.min_area, flip)
    jittered = _jitter(x, generator, settings)
    x = torch.where(_chance(x, generator, settings.jitter_probability), jittered, x)
    if x.shape[1] == 3:
        x = torch.where(_chance(x, generator, settings.grey_probability), _grey(x), x)
    return x


def _uniform(x: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw one number a sample, (N, 1, 1, 1)."""
    sample = torch.rand((len(x), 1, 1, 1), generator=generator, device=x.device)
    return low + (high - low) * sample


def _chance(x: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    return _uniform(x, generator, 0, 1) < probability


def _resized_crop(x: Tensor, generator: torch.Generator, min_area: float, flip: bool) -> Tensor:
    """Cut a box out of each image and resize it to the image's size.

    The box has a share in [min_area, 1] of the area and an aspect ratio in [3/4, 4/3]. It lies
    inside the image; one that is too wide or high is cut to the image's size.
    """
    area = _uniform(x, generator, min_area, 1)
    bound = math.log(ASPECT_RATIO)
    ratio = _uniform(x, generator, -bound, bound).exp()
    width = (area * ratio).sqrt().clamp(max=1).flatten()
    height = (area / ratio).sqrt().clamp(max=1).flatten()
    centre_x = _uniform(x, generator, -1, 1).flatten() * (1 - width)
    centre_y = _uniform(x, generator, -1, 1).flatten() * (1 - height)
    if flip:
        width = torch.where(_chance(x, generator, 0.5).flatten(), -width, width)
    zero = torch.zeros_like(width)
    box = torch.stack([width, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(box, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(
        x, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _jitter(x: Tensor, generator: torch.Generator, settings: Views) -> Tensor:
    def factor(strength: float) -> Tensor:
        return _uniform(x, generator, 1 - strength, 1 + strength)

    x = (x * factor(settings.brightness)).clamp(0, 1)
    mean = _grey(x).mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * factor(settings.contrast)).clamp(0, 1)
    if x.shape[1] == 3:
        grey = _grey(x)
        x = (grey + (x - grey) * factor(settings.saturation)).clamp(0, 1)
        x = _rotate_hue(x, _uniform(x, generator, -settings.hue, settings.hue)).clamp(0, 1)
    return x


def _grey(x: Tensor) -> Tensor:
    """Reduce images to their luma, (N, 1, H, W); grey images stay as they are."""
    if x.shape[1] == 1:
        return x
    return (x * constant(LUMA, x).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _rotate_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate colours about the grey axis by `turns` (N, 1, 1, 1), in full circles.

    Rodrigues' formula with the axis (1, 1, 1)/√3 gives one matrix a sample, which saves the
    conversion to HSV and back.
    """
    angle = 2 * math.pi * turns.view(-1, 1, 1)
    identity = torch.eye(3, device=x.device)
    cross = constant(CROSS, x) / math.sqrt(3)
    third = torch.full((3, 3), 1 / 3, device=x.device)
    rotation = identity * angle.cos() + cross * angle.sin() + third * (1 - angle.cos())
    return torch.einsum("nij,njhw->nihw", rotation, x)
