"""Residual networks: the small one for CIFAR, and those for ImageNet."""

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock

from ssnas.engine.batch_norm import Norm

SMALL_SIZE = 64  # pixels; larger images get the stem of ImageNet's networks
_IMAGENET = {18: resnet18, 34: resnet34, 50: resnet50}


class ZeroPaddedShortcut(nn.Module):
    """He et al. 2016's option A: every second pixel, and channels of zeros after the given ones.

    Args:
        extra_channels: channels of zeros to add.
    """

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + extra_channels, ⌈H/2⌉, ⌈W/2⌉)."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra_channels))


def cifar_resnet32_features(in_channels: int) -> tuple[nn.Module, int]:
    """ResNet-32 for CIFAR (He et al. 2016, section 4.2), without its linear layer.

    A 3×3 convolution, three stages of five basic blocks with 16, 32 and 64 channels, global
    average pooling. With 3 input channels and a linear layer to 10 classes it has, in 31
    convolutions (461,232), batch norm (2,272) and linear layer (650), 464,154 parameters.

    Args:
        in_channels: channels of the images.

    Returns:
        The module from images (N, in_channels, H, W) to features (N, 64), and 64.
    """
    stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    blocks = [BasicBlock(16, 16, norm_layer=Norm) for _ in range(5)]
    for channels in (32, 64):
        half = channels // 2
        blocks.append(BasicBlock(half, channels, 2, ZeroPaddedShortcut(half), norm_layer=Norm))
        blocks += [BasicBlock(channels, channels, norm_layer=Norm) for _ in range(4)]
    features = nn.Sequential(
        stem,
        Norm(16),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return features, 64


def resnet_features(depth: int, in_channels: int, size: int) -> tuple[nn.Module, int]:
    """A ResNet of He et al. 2016, table 1, as torchvision builds it, without its linear layer.

    For images of at most `SMALL_SIZE` pixels it starts as MedMNIST's networks do (Yang et al.
    2023): with a 3×3 convolution of stride 1 and no max pooling, in place of 7×7 with stride 2.
    Depth 34 has 21.80 M parameters on ImageNet, the figure that T21 prints for its "ResNet-32".

    Args:
        depth: 18, 34 or 50.
        in_channels: channels of the images.
        size: height and width of the images, in pixels.

    Returns:
        The module from images (N, in_channels, size, size) to features (N, F), and F.
    """
    network = _IMAGENET[depth](norm_layer=Norm)
    kernel, stride = (3, 1) if size <= SMALL_SIZE else (7, 2)
    network.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if size <= SMALL_SIZE:
        network.maxpool = nn.Identity()
    out_features = network.fc.in_features
    network.fc = nn.Identity()
    return network, out_features
