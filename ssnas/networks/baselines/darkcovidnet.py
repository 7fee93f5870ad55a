"""DarkCovidNet, the network for chest X-rays that T21's Table 3 compares with."""

from torch import nn

from ssnas.engine.batch_norm import Norm
from ssnas.errors import InputError

LEAST_SIZE = 4  # pixels; the second pooling needs a map of 2×2, and the later maps grow first


def darkcovidnet_features(num_classes: int, in_channels: int, size: int) -> tuple[nn.Module, int]:
    """DarkCovidNet (Ozturk et al. 2020), without its linear layer.

    17 convolutions and five poolings. As in the authors' code, the 1×1 convolutions are padded
    too and thus enlarge the map by 2, and the last convolution, to `num_classes` channels, has
    its ReLU before its batch norm. At 256×256 the last map is 13×13, and with 3 input channels
    and a linear layer from 2 · 13² to 2 classes there are 1,164,434 parameters.

    Args:
        num_classes: channels of the last map.
        in_channels: channels of the images.
        size: height and width of the images, in pixels.

    Returns:
        The module from images (N, in_channels, size, size) to features (N, F), and F.

    Raises:
        InputError: if `size` is too small for five poolings.
    """
    if size < LEAST_SIZE:
        raise InputError(f"size: found {size}; darkcovidnet accepts {LEAST_SIZE} pixels or more")
    layers = [*_conv(in_channels, 8, 3), nn.MaxPool2d(2), *_conv(8, 16, 3)]
    for channels in (16, 32, 64, 128):
        layers += [nn.MaxPool2d(2), *_triple(channels, 2 * channels)]
    layers += [*_conv(256, 128, 1), *_conv(128, 256, 3)]
    layers += [
        nn.Conv2d(256, num_classes, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        Norm(num_classes),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), num_classes * _last_map(size) ** 2


def _conv(in_channels: int, channels: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, kernel, padding=1, bias=False),
        Norm(channels),
        nn.LeakyReLU(0.1, inplace=True),
    ]


def _triple(narrow: int, wide: int) -> list[nn.Module]:
    return [*_conv(narrow, wide, 3), *_conv(wide, narrow, 1), *_conv(narrow, wide, 3)]


def _last_map(size: int) -> int:
    """Height of the last map: five poolings halve it, five 1×1 convolutions add 2 each."""
    size //= 4
    for _ in range(3):
        size = (size + 2) // 2
    return size + 4
