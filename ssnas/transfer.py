"""Training and testing on another data set, by its published split or by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssnas.config.schema import Finetune
from ssnas.data import Dataset, Source, folds, split
from ssnas.data.views import Normalise
from ssnas.finetune import evaluate, fit
from ssnas.networks.derived import inherit
from ssnas.runtime.device import seed_everything
from ssnas.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Part:
    """Training, validation and test images of one fold, or of a published split."""

    train: Dataset
    val: Dataset
    test: Dataset
    flip: bool


def parts(source: Source, k: int, val_fraction: float, seed: int) -> list[Part]:
    """The source's own split, or k stratified folds where it publishes no test images.

    Every fold holds out `val_fraction` of its training images for validation.

    Raises:
        InputError: if a class is too small for k folds or for the validation images.
    """
    tests = [(source.train, source.test)]
    if source.test is None:
        pool = source.train
        tests = [(pool.take(train), pool.take(test)) for train, test in folds(pool, k, seed)]
    cut = []
    for train, test in tests:
        fold = Source(train, source.val, test, source.provenance, source.flip)
        splits = split(
            fold,
            profile="natural",
            imbalance=1.0,
            largest_class=None,
            val_fraction=val_fraction,
            test_fraction=val_fraction,
            seed=seed,
        )
        cut.append(Part(splits.train, splits.val, splits.test, source.flip))
    return cut


def train_and_test(
    build: Callable[[], nn.Module],
    weights: Mapping[str, Tensor] | None,
    part: Part,
    config: Finetune,
    seed: int,
    device: torch.device,
    name: str,
    checkpoint: Checkpoint,
) -> tuple[dict[str, float], float]:
    """Figures on the part's test images after training on its training images, and the seconds.

    A finished part's checkpoint stays, so that an interrupted cross-validation does not train its
    finished folds again.

    Args:
        build: makes the network for this part's channels and classes.
        weights: to inherit, or None to start from a random initialisation.
    """
    seed_everything(seed)
    network = build()
    if weights is not None:
        inherit(network, weights)
    normalise = Normalise.of(part.train.images)
    fitted = fit(
        network,
        part.train,
        part.val,
        normalise,
        part.flip,
        config,
        seed,
        device,
        name=name,
        checkpoint=checkpoint,
    )
    return evaluate(network, part.test, normalise, device), fitted.seconds
