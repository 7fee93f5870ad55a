"""A plain convolutional network, the first thing that a person would try."""

from itertools import pairwise

from torch import nn

from ssnas.engine.batch_norm import Norm

WIDTHS = (16, 32, 32, 64, 64, 128)
"""Channels of the convolutions; where they grow, the stride is 2."""


def plain_features(in_channels: int) -> tuple[nn.Module, int]:
    """Six 3×3 convolutions, each with batch norm and ReLU, and global average pooling.

    With 3 input channels and a linear layer to 10 classes it has 145,242 parameters.

    Args:
        in_channels: channels of the images.

    Returns:
        The module from images (N, in_channels, H, W) to features (N, 128), and 128.
    """
    layers: list[nn.Module] = []
    for before, width in pairwise((in_channels, *WIDTHS)):
        stride = 2 if layers and width > before else 1
        layers += [
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            Norm(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), WIDTHS[-1]
