"""Baselines that a searched network has to beat."""

from torch import nn

from ssnas.errors import InputError
from ssnas.networks.baselines.classifier import (
    FeatureClassifier,
    NormalisedLinear,
    normalise_classifier,
)
from ssnas.networks.baselines.darkcovidnet import darkcovidnet_features
from ssnas.networks.baselines.linear import linear_classifier
from ssnas.networks.baselines.resnet import cifar_resnet32_features, resnet_features

__all__ = [
    "BASELINES",
    "NormalisedLinear",
    "build_baseline",
    "linear_classifier",
    "normalise_classifier",
]

_FEATURES = {
    "resnet-32": lambda num_classes, in_channels, size: cifar_resnet32_features(in_channels),
    "resnet-18": lambda num_classes, in_channels, size: resnet_features(18, in_channels, size),
    "resnet-34": lambda num_classes, in_channels, size: resnet_features(34, in_channels, size),
    "resnet-50": lambda num_classes, in_channels, size: resnet_features(50, in_channels, size),
    "darkcovidnet": darkcovidnet_features,
}
BASELINES: tuple[str, ...] = tuple(_FEATURES)


def build_baseline(name: str, num_classes: int, in_channels: int, size: int) -> nn.Module:
    """A published network, with its last linear layer as `classifier`.

    Args:
        name: one of `BASELINES`; "resnet-32" is the 0.46 M network for CIFAR, the others are
            those of their papers.
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
