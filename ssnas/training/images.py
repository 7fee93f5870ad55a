"""The images that a training sees, and how it shows them to a network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssnas.data.types import Dataset, Splits
from ssnas.data.views import Normalise
from ssnas.runtime.mapped import release


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images, and how a network is shown them.

    Attributes:
        train: images to train on.
        val: images to watch the training by.
        normalise: by the statistics of the training images.
        flip: also train on images mirrored left to right.
    """

    train: Dataset
    val: Dataset
    normalise: Normalise
    flip: bool

    @classmethod
    def of(cls, splits: Splits) -> TrainingData:
        """Take the training and validation images; the test images stay out of reach."""
        return cls(splits.train, splits.val, Normalise.of(splits.train.images), splits.flip)


@dataclass(frozen=True)
class TrainingImages:
    """Images on the device that trains on them.

    Attributes:
        pixels: uint8 (N, H, W, C).
        normalise: makes them the network's input.
        flip: also show them mirrored left to right.
        labels: (N,) class indices or (N, L) multi-hot; None for a self-supervised objective, which
            reads none.
        num_classes: C, or 0 without labels.
        file: the images as the data set has them, for `release`.
    """

    pixels: Tensor
    normalise: Normalise
    flip: bool
    labels: Tensor | None = None
    num_classes: int = 0
    file: np.ndarray | None = None

    @classmethod
    def of(
        cls, data: Dataset, normalise: Normalise, flip: bool, device: torch.device
    ) -> TrainingImages:
        """Move a data set's images and labels to the device."""
        pixels, labels = (
            torch.from_numpy(array).to(device) for array in (data.images, data.labels)
        )
        return cls(pixels, normalise, flip, labels, data.num_classes, data.images)

    def release(self) -> None:
        """Give the memory of images that lie in a file back, until they are drawn again."""
        if self.file is not None:
            release(self.file)
