"""The candidate operations, as the DARTS papers define them.

Supernet and network build their operations from the one table `build`, so weights move between
them by name. In the search, batch norm has no affine parameters (`affine=False`): a scale there
would undo the architecture weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssnas.engine.batch_norm import Norm, joined
from ssnas.networks.space import OPS


class ConvNorm(nn.Module):
    """ReLU, 1×1 convolution, batch norm: brings a cell's input to the cell's channels."""

    stride = 1

    def __init__(self, in_channels: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = Norm(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(x.relu()))

    @staticmethod
    def grids(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def joint_kernel(ops: Sequence[ConvNorm]) -> Tensor:
        return joined([op.pointwise.weight for op in ops])


class FactorizedReduce(nn.Module):
    """Halves height and width: ReLU, two 1×1 stride-2 convolutions on shifted grids, batch norm.

    Like `ConvNorm`, several of one x are, but for their batch norms, one 1×1 convolution of the
    rectified `grids` with their `joint_kernel`.
    """

    stride = 2

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

    @staticmethod
    def grids(x: Tensor) -> Tensor:
        """The pixels that both convolutions read, side by side, (N, 2 C, ⌈H/2⌉, ⌈W/2⌉)."""
        return _BothGrids.apply(x)

    @staticmethod
    def joint_kernel(ops: Sequence[FactorizedReduce]) -> Tensor:
        """Half of the weights are zero, (E C', 2 C, 1, 1)."""
        inputs = ops[0].even.in_channels
        kernels = []
        for op in ops:
            kernels += [
                nn.functional.pad(op.even.weight, (0, 0, 0, 0, 0, inputs)),
                nn.functional.pad(op.odd.weight, (0, 0, 0, 0, inputs, 0)),
            ]
        return torch.cat(kernels)


class _BothGrids(torch.autograd.Function):
    """The even pixels and those diagonally after them, (N, C, H, W) to (N, 2 C, ⌈H/2⌉, ⌈W/2⌉).

    PyTorch's own backward of two slices writes two whole images of zeros and adds them.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.size = x.shape
        odd = nn.functional.pad(x[:, :, 1::2, 1::2], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return torch.cat([x[:, :, ::2, ::2], odd], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        n, channels, height, width = ctx.size
        even, odd = gradient.split(channels, dim=1)
        x = gradient.new_zeros((n, height, width, channels)).permute(0, 3, 1, 2)
        x[:, :, ::2, ::2] = even
        x[:, :, 1::2, 1::2] = odd[:, :, : height // 2, : width // 2]
        return x


class DepthwiseSeparable(nn.Module):
    """ReLU, depthwise convolution, pointwise convolution, batch norm."""

    def __init__(
        self, channels: int, kernel: int, stride: int, dilation: int, affine: bool
    ) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
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


class SepConv(nn.Module):
    """Two depthwise separable convolutions; the first one carries the stride."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(channels, kernel, stride, 1, affine)
        self.second = DepthwiseSeparable(channels, kernel, 1, 1, affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    @property
    def norm(self) -> Norm:
        return self.second.norm


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


class Zero(nn.Module):
    """The op `none`: zeros of the output's size."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def bypass(x: Tensor, stride: int) -> Tensor:
    """What becomes of the channels that pass by an edge's operations (PC-DARTS, Xu et al. 2020).

    Returns:
        `x` at stride 1; at stride 2 its 2×2 max pooling, (N, C, ⌈H/2⌉, ⌈W/2⌉).
    """
    return x if stride == 1 else nn.functional.max_pool2d(x, 2, ceil_mode=True)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel g C/K + i of (N, C, H, W) becomes channel i K + g (Zhang et al. 2018; K groups).

    PyTorch's function of that name, but the result is channels-last on every device.
    """
    x = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    return x.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


_BUILDERS = {
    "none": lambda c, s, affine: Zero(s),
    "max_pool_3x3": lambda c, s, affine: Pool(c, s, "max"),
    "avg_pool_3x3": lambda c, s, affine: Pool(c, s, "avg"),
    "skip_connect": lambda c, s, affine: (
        nn.Identity() if s == 1 else FactorizedReduce(c, c, affine)
    ),
    "sep_conv_3x3": lambda c, s, affine: SepConv(c, 3, s, affine),
    "sep_conv_5x5": lambda c, s, affine: SepConv(c, 5, s, affine),
    "dil_conv_3x3": lambda c, s, affine: DepthwiseSeparable(c, 3, s, 2, affine),
    "dil_conv_5x5": lambda c, s, affine: DepthwiseSeparable(c, 5, s, 2, affine),
}


def build(op: str, channels: int, stride: int, affine: bool) -> nn.Module:
    """The module of `op` for `channels` → `channels` at `stride` 1 or 2.

    Raises:
        ValueError: for a name outside `space.OPS`.
    """
    if op not in _BUILDERS:
        raise ValueError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    return _BUILDERS[op](channels, stride, affine)
