"""The types that every other module receives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssnas.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory.

    images: uint8 (N, H, W, C), C in {1, 3}.
    labels: int64 (N,) class indices, or uint8 (N, L) multi-hot.
    class_names: one name per class or label.

    Raises InputError where shapes, types or label values disagree with that.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_images(self.images, "images")
        if len(self.labels) != len(self.images):
            raise InputError(
                f"labels: found {len(self.labels)} for {len(self.images)} images; accepted: "
                "one each"
            )
        found = f"labels: found {self.labels.dtype} {self.labels.shape}"
        classes = len(self.class_names)
        if self.multi_label:
            if self.labels.dtype != np.uint8 or self.labels.shape[1:] != (classes,):
                raise InputError(f"{found}; accepted: uint8 (N, {classes}) multi-hot")
            if self.labels.size and self.labels.max() > 1:
                raise InputError(f"labels: found {self.labels.max()}; accepted: 0 and 1")
        elif self.labels.dtype != np.int64:
            raise InputError(f"{found}; accepted: int64 (N,)")
        elif self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < classes:
            raise InputError(
                f"labels: found values from {self.labels.min()} to {self.labels.max()}; "
                f"accepted: 0 to {classes - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim > 1

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> list[int]:
        """Images per class; positive images per label where there are many labels."""
        if self.multi_label:
            return self.labels.sum(axis=0, dtype=np.int64).tolist()
        return np.bincount(self.labels, minlength=self.num_classes).tolist()

    def take(self, indices: np.ndarray) -> Dataset:
        """The images at `indices`, in that order."""
        return Dataset(self.images[indices], self.labels[indices], self.class_names)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as published: None where it publishes no such split.

    provenance is JSON-able; flip says whether a mirrored image is still a plausible one.
    """

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    provenance: dict
    flip: bool


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint splits, ready to train on. provenance is JSON-able."""

    train: Dataset
    val: Dataset
    test: Dataset
    provenance: dict
    flip: bool


def check_images(images: np.ndarray, name: str) -> None:
    """Raise InputError naming `name` unless `images` are uint8 (N, H, W, C) with C in {1, 3}."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"{name}: found {images.dtype} {images.shape}; accepted: uint8 (N, H, W, C), C 1 or 3"
        )
