"""ShuffleNet V2, a network made for processors without an accelerator."""

from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from ssnas.engine.batch_norm import Norm

SMALL_SIZE = 64  # pixels; larger images get the stem of ImageNet


def shufflenet_features(in_channels: int, size: int) -> tuple[nn.Module, int]:
    """ShuffleNet V2 0.5× (Ma et al. 2018), as torchvision builds it, without its linear layer.

    For images of at most `SMALL_SIZE` pixels the first convolution has stride 1, and there is no
    max pooling, as is customary for CIFAR. With 3 input channels and a linear layer to 10 classes
    it has 352,042 parameters.

    Args:
        in_channels: channels of the images.
        size: height and width of the images, in pixels.

    Returns:
        The module from images (N, in_channels, size, size) to features (N, 1024), and 1024.
    """
    network = shufflenet_v2_x0_5()
    first = network.conv1[0]
    stride = 1 if size <= SMALL_SIZE else 2
    network.conv1[0] = nn.Conv2d(in_channels, first.out_channels, 3, stride, padding=1, bias=False)
    if size <= SMALL_SIZE:
        network.maxpool = nn.Identity()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, Norm(child.num_features))
    out_features = network.fc.in_features
    network.fc = nn.Identity()
    return network, out_features
