"""The candidate operations, as the DARTS papers define them (Liu et al. 2019, arXiv 1806.09055).

Each name stands once, with the function that builds its module: supernet and derived network build
from the same table, so weights move between them by name. A further operation needs nothing but an
entry here; see `operation`.

In the search, batch norm has no affine parameters (`affine=False`): a scale there would undo the
architecture weights. A module's method `lower` describes it to the engine, which then computes it
side by side with others; a module without one is computed by its `forward`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssnas.engine import op_group as engine
from ssnas.engine.batch_norm import Norm

Builder = Callable[[int, int, bool], nn.Module]
"""From channels, stride (1 or 2) and whether batch norms are affine to the operation's module."""

OPERATIONS: dict[str, Builder] = {}
"""The candidate operations by name, in the order of the architecture weights' columns."""

RELAXATIONS: dict[str, tuple[str, ...]] = {"softmax": (), "sigmoid": ()}
"""The candidates of each relaxation: independent sigmoids need no `none` (FairDARTS)."""


def operation(name: str) -> Callable[[Builder], Builder]:
    """Register a candidate operation: the function below builds its module.

    Example, a plain 7×7 convolution::

        @operation("conv_7x7")
        def conv_7x7(channels, stride, affine):
            return nn.Conv2d(channels, channels, 7, stride, padding=3, bias=False)
    """

    def register(builder: Builder) -> Builder:
        OPERATIONS[name] = builder
        for relaxation in RELAXATIONS:
            if name != "none" or relaxation == "softmax":
                RELAXATIONS[relaxation] += (name,)
        return builder

    return register


def kept_operations() -> tuple[str, ...]:
    """The operations that an edge may keep: all but `none`.

    Example:
        >>> kept_operations()[:3]
        ('max_pool_3x3', 'avg_pool_3x3', 'skip_connect')
    """
    return tuple(name for name in OPERATIONS if name != "none")


def build(op: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """Build the module of an operation, from C = `channels` to C channels.

    Args:
        op: a key of `OPERATIONS`.
        channels: C.
        stride: 1, or 2 to halve height and width (rounded up).
        affine: whether batch norms have affine parameters.

    Raises:
        ValueError: for a name that is not there.

    Example:
        >>> build("sep_conv_3x3", 8, stride=2, affine=True)(torch.zeros(2, 8, 7, 7)).shape
        torch.Size([2, 8, 4, 4])
    """
    if op not in OPERATIONS:
        raise ValueError(f"unknown op {op!r}; choose from {', '.join(OPERATIONS)}")
    return OPERATIONS[op](channels, stride, affine)


class ConvNorm(nn.Module):
    """ReLU, 1×1 convolution, batch norm: brings a cell's input to the cell's channels."""

    def __init__(self, in_channels: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = Norm(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(x.relu()))

    def lower(self) -> engine.Project:
        return engine.Project((self.pointwise,), self.norm)


class FactorizedReduce(nn.Module):
    """Halves height and width: ReLU, two 1×1 stride-2 convolutions on shifted grids, batch norm."""

    def __init__(self, in_channels: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, channels - channels // 2, 1, stride=2, bias=False)
        self.norm = Norm(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        # The shift keeps the size, so that both grids have equally many points if it is odd.
        shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))

    def lower(self) -> engine.Project:
        return engine.Project((self.even, self.odd), self.norm)


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise convolution, pointwise convolution, batch norm."""

    def __init__(
        self, channels: int, kernel: int, stride: int, dilation: int, affine: bool
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel - 1) // 2,
            dilation=dilation,
            groups=channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = Norm(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(x.relu())))

    @property
    def layer(self) -> engine.SeparableLayer:
        return engine.SeparableLayer(self.depthwise, self.pointwise, self.norm)

    def lower(self) -> engine.Separable:
        return engine.Separable((self.layer,))


class SepConv(nn.Module):
    """Two depthwise separable convolutions; the first one carries the stride."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(channels, kernel, stride, 1, affine)
        self.second = DepthwiseSeparable(channels, kernel, 1, 1, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def lower(self) -> engine.Separable:
        return engine.Separable((self.first.layer, self.second.layer))


class Pool(nn.Module):
    """3×3 pooling, then batch norm without affine parameters, as in the published supernets.

    The derived network keeps the batch norm, because the weights that it inherits were trained
    behind it; without affine parameters it adds nothing to the parameter count.
    """

    def __init__(self, channels: int, stride: int, kind: str) -> None:
        super().__init__()
        self.pool = (
            nn.MaxPool2d(3, stride=stride, padding=1)
            if kind == "max"
            else nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)
        )
        self.norm = Norm(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(x))

    def lower(self) -> engine.Pool:
        return engine.Pool(self.pool, self.norm)


class Zero(nn.Module):
    """The op `none`: zeros of the output's size."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def lower(self) -> engine.Zero:
        return engine.Zero(self.stride)


def bypass(x: Tensor, stride: int) -> Tensor:
    """Bring the channels that pass by an edge's operations to its target's size (PC-DARTS).

    Returns:
        `x` at stride 1; at stride 2 its 2×2 max pooling, (N, C, ⌈H/2⌉, ⌈W/2⌉) (Xu et al. 2020).

    Example:
        >>> bypass(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), stride=2)
        tensor([[[[4.]]]])
    """
    return x if stride == 1 else nn.functional.max_pool2d(x, 2, ceil_mode=True)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Shuffle channels: channel g C/K + i becomes channel i K + g (Zhang et al. 2018; K groups).

    This is PyTorch's function of that name, but the result is channels-last on every device.

    Example:
        >>> channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), groups=3).flatten()
        tensor([0., 2., 4., 1., 3., 5.])
    """
    x = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    return x.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


@operation("none")
def _none(channels: int, stride: int, affine: bool) -> nn.Module:
    return Zero(stride)


@operation("max_pool_3x3")
def _max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return Pool(channels, stride, "max")


@operation("avg_pool_3x3")
def _average_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    return Pool(channels, stride, "avg")


@operation("skip_connect")
def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


@operation("sep_conv_3x3")
def _separable_3(channels: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(channels, 3, stride, affine)


@operation("sep_conv_5x5")
def _separable_5(channels: int, stride: int, affine: bool) -> nn.Module:
    return SepConv(channels, 5, stride, affine)


@operation("dil_conv_3x3")
def _dilated_3(channels: int, stride: int, affine: bool) -> nn.Module:
    return DepthwiseSeparable(channels, 3, stride, 2, affine)


@operation("dil_conv_5x5")
def _dilated_5(channels: int, stride: int, affine: bool) -> nn.Module:
    return DepthwiseSeparable(channels, 5, stride, 2, affine)
