"""Baselines that a searched network has to beat."""

from collections.abc import Callable

from torch import nn

from ssnas.errors import InputError
from ssnas.networks.baselines.classifier import (
    FeatureClassifier,
    NormalisedLinear,
    normalise_classifier,
)

__all__ = ["BASELINES", "NormalisedLinear", "build_baseline", "normalise_classifier"]

Features = tuple[nn.Module, int]
"""A module from images to feature vectors, and their length."""


# The networks' modules are imported when they are built: torchvision is no dependency of a model.


def _resnet32(num_classes: int, in_channels: int, size: int) -> Features:
    from ssnas.networks.baselines.resnet import cifar_resnet32_features

    return cifar_resnet32_features(in_channels)


def _resnet(depth: int) -> Callable[[int, int, int], Features]:
    def features(num_classes: int, in_channels: int, size: int) -> Features:
        from ssnas.networks.baselines.resnet import resnet_features

        return resnet_features(depth, in_channels, size)

    return features


def _darkcovidnet(num_classes: int, in_channels: int, size: int) -> Features:
    from ssnas.networks.baselines.darkcovidnet import darkcovidnet_features

    return darkcovidnet_features(num_classes, in_channels, size)


def _plain(num_classes: int, in_channels: int, size: int) -> Features:
    from ssnas.networks.baselines.plain import plain_features

    return plain_features(in_channels)


def _shufflenet(num_classes: int, in_channels: int, size: int) -> Features:
    from ssnas.networks.baselines.shufflenet import shufflenet_features

    return shufflenet_features(in_channels, size)


_FEATURES = {
    "plain-cnn": _plain,
    "shufflenet": _shufflenet,
    "resnet-32": _resnet32,
    "resnet-18": _resnet(18),
    "resnet-34": _resnet(34),
    "resnet-50": _resnet(50),
    "darkcovidnet": _darkcovidnet,
}
BASELINES: tuple[str, ...] = tuple(_FEATURES)


def build_baseline(name: str, num_classes: int, in_channels: int, size: int) -> nn.Module:
    """A published network, with its last linear layer as `classifier`.

    Args:
        name: one of `BASELINES`; "plain-cnn" is six convolutions, "resnet-32" the 0.46 M network
            for CIFAR, the others are those of their papers.
        num_classes: outputs (labels, when multi-label).
        in_channels: channels of the images.
        size: height and width of the images, in pixels.

    Returns:
        A module from images (N, in_channels, size, size) to logits (N, num_classes).

    Raises:
        InputError: if the name is unknown, or the images are too small for the network.

    Example:
        >>> network = build_baseline("resnet-18", num_classes=3, in_channels=1, size=32)
        >>> network.classifier
        Linear(in_features=512, out_features=3, bias=True)
    """
    if name not in _FEATURES:
        raise InputError(f"network: found {name!r}; choose from {', '.join(BASELINES)}")
    return FeatureClassifier(*_FEATURES[name](num_classes, in_channels, size), num_classes)
