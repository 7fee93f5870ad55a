"""The network that a run trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ssnas.config.schema import Finetune, Search
from ssnas.errors import InputError
from ssnas.networks.baselines import BASELINES, build_baseline, normalise_classifier
from ssnas.networks.bilateral import build_supernet
from ssnas.networks.derived import DerivedNetwork, inherit, parameter_count
from ssnas.networks.genotype import Genotype

NETWORKS = ("derived", "supernet", *BASELINES)
"""The names of `finetune.network`: that of the genotype, the searched supernet, or a baseline."""

FEWEST_CHANNELS, MOST_CHANNELS = 2, 4096


def build_network(
    config: Finetune,
    search: Search,
    genotype: Genotype | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> nn.Module:
    """Build the network of `finetune.network`.

    LDAM's logits are cosines, so its classifier is a normalised one (Cao et al. 2019).

    Args:
        config: its `network`, `channels`, `cells` and `loss`.
        search: the supernet's sizes and stem.
        genotype: the operations of a derived network; None for another one.
        num_classes: outputs of the classifier (labels, when multi-label).
        image_shape: (H, W, C) of the images.

    Raises:
        InputError: if the search has no such network, or an option does not go with it.

    Example:
        >>> config = Finetune(network="resnet-32")
        >>> build_network(config, Search(), None, 10, (32, 32, 3)).classifier
        Linear(in_features=64, out_features=10, bias=True)
    """
    check_network(config, search)
    size, _, in_channels = image_shape
    if config.network == "supernet":
        return build_supernet(search, image_shape, num_classes)
    if config.network in BASELINES:
        network = build_baseline(config.network, num_classes, in_channels, size)
    else:
        if genotype is None:
            raise InputError("finetune.network: found 'derived' without a genotype")
        build = partial(
            DerivedNetwork,
            genotype,
            num_cells=config.cells or search.cells,
            num_classes=num_classes,
            in_channels=in_channels,
            stem_multiplier=search.stem_multiplier,
            stem=search.stem or "cifar",
        )
        channels = config.channels or search.channels
        if config.parameters:
            channels = channels_for(config.parameters, lambda c: build(channels=c))
        network = build(channels=channels)
    if config.loss == "ldam-drw":
        normalise_classifier(network)
    return network


def channels_for(parameters: int, build: Callable[[int], nn.Module]) -> int:
    """Find the channels whose network has the number of parameters nearest to a target.

    Args:
        parameters: the target.
        build: makes the network of a number of channels; more channels are more parameters.

    Example:
        A linear layer from C to C features has C² + C parameters:

        >>> channels_for(111, lambda channels: nn.Linear(channels, channels))
        10
    """

    def count(channels: int) -> int:
        with torch.device("meta"):
            return parameter_count(build(channels))

    low, high = FEWEST_CHANNELS, 2 * FEWEST_CHANNELS
    while count(high) < parameters and high < MOST_CHANNELS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((low, high), key=lambda channels: abs(count(channels) - parameters))


def check_network(config: Finetune, search: Search) -> None:
    """Refuse options that would otherwise be ignored, or fail far from their cause.

    Raises:
        InputError: naming the option.

    Example:
        >>> check_network(Finetune(network="resnet-32", cells=4), Search())
        Traceback (most recent call last):
        ssnas.errors.InputError: finetune.cells: found 4 with network 'resnet-32'; accepted with \
network derived alone
    """
    if config.parameters and (config.channels or config.inherit):
        raise InputError(
            f"finetune.parameters: found {config.parameters} with inherit {config.inherit} and "
            f"channels {config.channels}; accepted with inherit false and channels null, since "
            "other channels than the searched ones inherit nothing"
        )
    if config.network == "derived":
        return
    for key in ("cells", "channels", "parameters", "pretrain_epochs"):
        if getattr(config, key):
            raise InputError(
                f"finetune.{key}: found {getattr(config, key)} with network {config.network!r}; "
                "accepted with network derived alone"
            )
    if config.network != "supernet":
        return
    if search.objective != "supervised":
        raise InputError(
            "finetune.network: found 'supernet' of a self-supervised search, which has no "
            "classifier; accepted with search.objective supervised"
        )
    if config.loss == "ldam-drw" or not config.inherit:
        raise InputError(
            "finetune.network: found 'supernet', which keeps its searched weights and classifier; "
            "accepted with inherit true and a loss other than ldam-drw"
        )


def start_from_search(network: nn.Module, config: Finetune, weights: Mapping[str, Tensor]) -> bool:
    """Give `network` the searched weights that it starts from.

    A supernet goes on as the search left it; a derived network inherits, unless told not to.

    Returns:
        whether it now has searched weights.

    Raises:
        InputError: if the weights are those of other channels or cells.
    """
    if config.network == "supernet":
        network.load_state_dict(weights)
        return True
    if isinstance(network, DerivedNetwork) and config.inherit:
        inherit(network, weights)
        return True
    return False
