"""Recipes: named values of many parameters, for search and training.

`published` is the papers' protocol, made for a GPU and hundreds of epochs. `short` is ours, made
for minutes on a CPU. docs/recipes.md has what was tried, on validation images, and what it gave.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

from ssnas.config.schema import Search, Training

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "published": {},
    "short": {
        "views": {"min_area": 0.4},
        "search": {
            "epochs": None,
            "batch_size": None,
            "optimiser": "adamw",
            "schedule": "one-cycle",
            "learning_rate": 3e-3,
            "weight_decay": 0.02,
            "decay_norms": False,
            "alpha_learning_rate": None,
            "alpha_warm_up": 0.25,
            "channels": None,
            "stem": None,
        },
        "finetune": {
            "epochs": None,
            "batch_size": None,
            "optimiser": "adamw",
            "schedule": "one-cycle",
            "learning_rate": 8e-3,
            "weight_decay": None,
            "decay_norms": False,
            "averaging": 0.2,
            "loss": "ce+la",
        },
        "transfer": {"epochs": None, "loss": "ce+la"},
    },
}
"""By name, the keys of each section that a recipe sets, beside the papers' in `schema`."""


class Length(NamedTuple):
    """How long a search or a training is.

    Attributes:
        images: that it sees, repetitions included, unless that is too few or too many epochs.
        fewest: epochs.
        most: epochs.
    """

    images: int
    fewest: int
    most: int


SEARCH_LENGTH, TRAINING_LENGTH = Length(8_000, 5, 40), Length(60_000, 30, 100)

BATCHES = (16, 250), (32, 4000)
"""Batch sizes, each with the most images that it is for."""

LARGEST_BATCH = 64

MANY_IMAGES = 1000
"""Images from which on a training is short of time rather than of images."""

FEW_CHANNELS, MANY_CHANNELS = 12, 16
FEW_DECAY, MANY_DECAY = 1.0, 0.02
REDUCED_SIZE = 24
"""Pixels from which on a stem reduces the images."""

T = TypeVar("T", bound=Training)


def sized(config: T, images: int) -> T:
    """Replace what is null of `epochs`, `batch_size` and `weight_decay` by what suits the images.

    Args:
        config: of a search or a training.
        images: the training images; a search shares them out between α and ω.

    Example:
        >>> from ssnas.config.schema import Finetune
        >>> by_number = Finetune(epochs=None, batch_size=None)
        >>> sizes = [sized(by_number, images) for images in (100, 800, 20_000)]
        >>> [(size.epochs, size.batch_size) for size in sizes]
        [(100, 16), (75, 32), (30, 64)]
        >>> sized(Finetune(epochs=7), 800).epochs
        7
    """
    epochs, batch = config.epochs, config.batch_size
    parts = alpha_and_omega(images, config.omega_share) if isinstance(config, Search) else (images,)
    if epochs is None:
        length = SEARCH_LENGTH if isinstance(config, Search) else TRAINING_LENGTH
        by_number = round(length.images / max(1, parts[-1]))
        epochs = min(max(by_number, length.fewest), length.most)
    if batch is None:
        batch = next((size for size, most in BATCHES if images <= most), LARGEST_BATCH)
        batch = max(2, min(batch, *parts))
    decay = config.weight_decay
    if decay is None:
        decay = FEW_DECAY if images < MANY_IMAGES else MANY_DECAY
    return dataclasses.replace(config, epochs=epochs, batch_size=batch, weight_decay=decay)


def shaped(config: Search, images: int, size: int) -> Search:
    """Replace `channels` and `stem`, where they are null, by what suits the training images.

    Args:
        config: of the network that is searched, or derived without a search.
        images: the labelled training images.
        size: their side in pixels.

    Example:
        >>> by_number = Search(channels=None, stem=None)
        >>> shapes = [shaped(by_number, *of) for of in ((500, 8), (500, 32), (5000, 32))]
        >>> [(shape.channels, shape.stem) for shape in shapes]
        [(12, 'cifar'), (12, 'half'), (16, 'quarter')]
    """
    few = images < MANY_IMAGES
    channels = config.channels or (FEW_CHANNELS if few else MANY_CHANNELS)
    stem = config.stem or ("cifar" if size < REDUCED_SIZE else "half" if few else "quarter")
    return dataclasses.replace(config, channels=channels, stem=stem)


def alpha_and_omega(images: int, omega_share: float) -> tuple[int, int]:
    """Share the images of a search out: how many drive α, and how many ω.

    Example:
        >>> alpha_and_omega(40, 0.8)
        (8, 32)
    """
    # 40 · (1 − 0.8) comes out as 7.999999999999998.
    return int(images * (1 - omega_share) + 1e-6), int(images * omega_share + 1e-6)


def within(config: T, seconds: float, epoch_seconds: float) -> T:
    """Set the epochs that fit into so many seconds: at least one.

    Example:
        >>> from ssnas.config.schema import Finetune
        >>> within(Finetune(), seconds=60, epoch_seconds=1.7).epochs
        35
    """
    return dataclasses.replace(config, epochs=max(1, int(seconds / epoch_seconds)))
