"""Training and testing on another data set, by its published split or by cross-validation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ssnas.config.schema import Finetune
from ssnas.data import Dataset, Source, Splits, folds, split
from ssnas.finetune import evaluate, fit
from ssnas.runtime.device import seed_everything
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData


def folds_of(source: Source, k: int, val_fraction: float, seed: int) -> list[Splits]:
    """Split a source for training and testing, as often as its test protocol asks for.

    A source with test images of its own has one fold: the published one. Another one is
    cross-validated: k stratified folds, each of which tests on the images that the others train on.

    Args:
        k: the number of folds of a cross-validation.
        val_fraction: the share of a fold's training images to validate on, where the source has no
            validation images of its own.

    Raises:
        InputError: if a class is too small for k folds or for the validation images.

    Example:
        >>> import numpy as np
        >>> labels = np.repeat(np.arange(2), 6)
        >>> images = Dataset(np.zeros((12, 8, 8, 1), np.uint8), labels, ("cat", "dog"))
        >>> folds = folds_of(Source(images, None, None, {}, flip=True), 3, 0.25, seed=0)
        >>> [(len(fold.train), len(fold.val), len(fold.test)) for fold in folds]
        [(6, 2, 4), (6, 2, 4), (6, 2, 4)]
    """
    held_out: list[tuple[Dataset, Dataset | None]] = [(source.train, source.test)]
    if source.test is None:
        pool = source.train
        held_out = [(pool.take(train), pool.take(test)) for train, test in folds(pool, k, seed)]
    return [
        split(
            Source(train, source.val, test, source.provenance, source.flip),
            profile="natural",
            imbalance=1.0,
            largest_class=None,
            val_fraction=val_fraction,
            test_fraction=val_fraction,
            seed=seed,
        )
        for train, test in held_out
    ]


def train_and_test(
    build: Callable[[], nn.Module],
    fold: Splits,
    config: Finetune,
    seed: int,
    device: torch.device,
    name: str,
    checkpoint: Checkpoint,
) -> tuple[dict[str, float], float]:
    """Train a network on one fold, and test it there.

    A finished fold's checkpoint stays, so that an interrupted cross-validation does not train its
    finished folds again.

    Args:
        build: makes the network, for the fold's channels and classes; called once the global random
            generators have their seed.
        fold: one of `folds_of`.
        name: of the fold, in messages.

    Returns:
        The figures on the fold's test images, and the seconds of the training.
    """
    seed_everything(seed)
    network = build()
    data = TrainingData.of(fold)
    result = fit(network, data, config, seed, device, name, checkpoint)
    return evaluate(network, fold.test, data.normalise, device), result.seconds
