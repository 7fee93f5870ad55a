"""What can be known before a training begins, and would otherwise end it after minutes or hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssnas.config.recipes import sized
from ssnas.config.schema import Finetune, Search
from ssnas.data.types import Dataset
from ssnas.errors import InputError
from ssnas.losses import LOSSES
from ssnas.networks.backbone import STEMS
from ssnas.networks.bilateral import build_supernet
from ssnas.networks.factory import check_network
from ssnas.pipeline.work import computed_by
from ssnas.runtime.memory import available_memory, training_memory
from ssnas.training.objectives import criterion_of

SMALL = 2**28
"""Bytes below which no estimate is worth its seconds."""

MARGIN = 1.25
"""An estimate may be so much above what there is before it is refused."""


def check_training(config: Finetune, search: Search, train: Dataset) -> None:
    """Check that a network can be trained on these images with its loss.

    Raises:
        InputError: naming the loss and the class or label that it cannot be used with, or an option
            of the network.
    """
    check_network(config, search)
    if _works(config, train):
        return
    counts = dict(zip(train.class_names, train.counts, strict=True))
    never = [name for name, count in counts.items() if count == 0]
    always = [name for name, count in counts.items() if train.multi_label and count == len(train)]
    working = [name for name in LOSSES if _works(dataclasses.replace(config, loss=name), train)]
    reasons = [
        f"{_quoted(names)} {'occurs' if len(names) == 1 else 'occur'} {how} among the training "
        "images"
        for names, how in ((never, "never"), (always, "on every image"))
        if names
    ]
    if not reasons:
        # Not these images: the loss's own message says more.
        criterion_of(config, train)
    raise InputError(
        f"loss: found {config.loss!r}, but {' and '.join(reasons)}; choose from "
        f"{', '.join(working)}, or leave that class out"
    )


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _works(config: Finetune, train: Dataset) -> bool:
    try:
        criterion_of(config, train)
    except InputError:
        return False
    return True


def check_search_memory(search: Search, train: Dataset, device: torch.device) -> None:
    """Check that a step of the search fits the memory.

    Raises:
        InputError: with the estimate, what there is, and the parameters that lower it.
    """
    height, width, channels = train.images.shape[1:]
    views = 1 if search.objective == "supervised" else 2
    batch = views * sized(search, len(train)).batch_size
    pixels = height * width // STEMS[search.stem or "cifar"].stride ** 2
    # 400 values a channel and pixel in each cell are twice what the supernet keeps.
    bound = 4 * search.cells * search.channels * (400 * batch * pixels + 4000 * search.channels)

    def forward(network: nn.Module, images: Tensor) -> object:
        return network.features(images, network.architecture())  # type: ignore[operator]

    _check_memory(
        lambda: build_supernet(
            search, (height, width, channels), train.num_classes if views == 1 else None
        ),
        forward,
        [batch, channels, height, width],
        bound // (search.cells if search.checkpoint else 1),
        device,
        "the search",
        "search.batch_size, search.channels or data.size, or set search.checkpoint: true",
    )


def check_training_memory(
    config: Finetune,
    search: Search,
    build: Callable[[], nn.Module],
    train: Dataset,
    device: torch.device,
) -> None:
    """Check that a step of the training by labels fits the memory.

    Args:
        build: makes the network.

    Raises:
        InputError: with the estimate, what there is, and the parameters that lower it.
    """
    height, width, channels = train.images.shape[1:]
    batch = sized(config, len(train)).batch_size
    derived = config.network == "derived"
    # A published network keeps less than derived cells of 64 channels.
    wide, cells = (
        (config.channels or search.channels, config.cells or search.cells) if derived else (64, 20)
    )
    bound = 4 * cells * wide * (100 * batch * height * width + 4000 * wide)
    _check_memory(
        build,
        lambda network, images: network(images),
        [batch, channels, height, width],
        bound,
        device,
        "the training",
        "finetune.batch_size, finetune.channels or data.size",
    )


def kept_share(device: torch.device) -> float:
    """Return the share of PyTorch's memory that a step takes here.

    The compiled kernels take about two fifths, mixed precision half.
    """
    if computed_by(device)["compiled_kernels"]:
        return 0.4
    return 1.0 if device.type == "cpu" else 0.5


def _check_memory(
    build: Callable[[], nn.Module],
    forward: Callable[[nn.Module, Tensor], object],
    shape: list[int],
    bound: int,
    device: torch.device,
    work: str,
    remedy: str,
) -> None:
    available = available_memory(device)
    if available is None or bound < max(SMALL, available // 2):
        return
    estimate = kept_share(device) * training_memory(build, forward, shape)
    if estimate > MARGIN * available:
        raise InputError(
            f"memory: {work} would take about {estimate / 2**30:,.0f} GiB, and there are "
            f"{available / 2**30:,.1f}; lower {remedy}"
        )
