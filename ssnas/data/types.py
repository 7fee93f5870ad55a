"""Data sets in memory: labelled images, a source as published, and splits to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssnas.errors import InputError
from ssnas.runtime.mapped import taken

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory.

    Attributes:
        images: uint8 (N, H, W, C), C in {1, 3}.
        labels: class indices, int64 (N,), or multi-hot rows, uint8 (N, L).
        class_names: one name for each class or label.
        groups: what belongs together, such as the patient of each image, int64 (N,); None where
            images are on their own.
        ids: what messages call the images (N,), a file's name or a number; None for their position.

    Raises:
        InputError: where shapes, types or label values disagree with that.

    Example:
        >>> images = np.zeros((3, 8, 8, 1), np.uint8)
        >>> data = Dataset(images, np.array([0, 1, 1]), ("cat", "dog"))
        >>> len(data), data.num_classes, data.counts, data.multi_label
        (3, 2, [1, 2], False)
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_images(self.images, "images")
        if len(self.labels) != len(self.images):
            raise InputError(
                f"labels: found {len(self.labels)} for {len(self.images)} images; accepted: "
                "one each"
            )
        for name, values in (("groups", self.groups), ("ids", self.ids)):
            if values is not None and len(values) != len(self.images):
                raise InputError(
                    f"{name}: found {len(values)} for {len(self.images)} images; accepted: one each"
                )
        mismatch = f"labels: found {self.labels.dtype} {self.labels.shape}"
        classes = len(self.class_names)
        if self.multi_label:
            if self.labels.dtype != np.uint8 or self.labels.shape[1:] != (classes,):
                raise InputError(f"{mismatch}; accepted: uint8 (N, {classes}) multi-hot")
            if self.labels.size and self.labels.max() > 1:
                raise InputError(f"labels: found {self.labels.max()}; accepted: 0 and 1")
        elif self.labels.dtype != np.int64:
            raise InputError(f"{mismatch}; accepted: int64 (N,)")
        elif self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < classes:
            raise InputError(
                f"labels: found values from {self.labels.min()} to {self.labels.max()}; "
                f"accepted: 0 to {classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        """True where an image may have several labels."""
        return self.labels.ndim > 1

    @property
    def num_classes(self) -> int:
        """The number of classes or labels."""
        return len(self.class_names)

    @property
    def counts(self) -> list[int]:
        """The images of each class, or the positive images of each label."""
        if self.multi_label:
            counts = self.labels.sum(axis=0, dtype=np.int64)
        else:
            counts = np.bincount(self.labels, minlength=self.num_classes)
        return [int(count) for count in counts]

    def take(self, indices: np.ndarray) -> Dataset:
        """Keep the images at `indices`, in that order."""
        groups, ids = (
            None if values is None else values[indices] for values in (self.groups, self.ids)
        )
        images = taken(self.images, indices)
        return Dataset(images, self.labels[indices], self.class_names, groups, ids)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as published.

    Attributes:
        train: the training images.
        val: the validation images, or None where no such split is published.
        test: the test images, or None likewise.
        provenance: the origin and the treatment of the images, fit for JSON.
        flip: whether a mirrored image is still a plausible one.
    """

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    provenance: Mapping[str, Any]
    flip: bool


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint splits, ready to train on; `provenance` and `flip` as in `Source`.

    Attributes:
        unlabelled: images that only a search sees, uint8 (N, H, W, C), or None.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    provenance: Mapping[str, Any]
    flip: bool
    unlabelled: np.ndarray | None = None


def check_images(images: np.ndarray, name: str) -> None:
    """Check that images are uint8 (N, H, W, C) with C in {1, 3}.

    Raises:
        InputError: naming `name`, if they are not.

    Example:
        >>> check_images(np.zeros((2, 8, 8, 3), np.uint8), "images")
    """
    valid = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
    if not valid or 0 in images.shape[1:]:
        raise InputError(
            f"{name}: found {images.dtype} {images.shape}; accepted: uint8 (N, H, W, C), C 1 or 3, "
            "H and W at least 1"
        )
