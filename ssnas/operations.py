"""The candidate operations, as the DARTS papers define them.

Supernet and network build their operations from the one table `build`, so weights move between
them by name. In the search, batch norm has no affine parameters (`affine=False`): a scale there
would undo the architecture weights.
"""

import torch
from torch import Tensor, nn

from ssnas.space import OPS


class ScaledNorm(nn.BatchNorm2d):
    """Batch norm whose result may be multiplied by a scalar at no cost.

    scale · (x − mean) / std is batch norm with `scale` as its affine weight, so that a mixed
    operation's w(α)·o(x) needs no pass over memory of its own.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            return super().forward(x)
        if self.affine:
            raise ValueError("a scale and affine parameters would be the same thing twice")
        tracks = self.training and self.track_running_stats
        keeps = tracks or not self.training
        return nn.functional.batch_norm(
            x,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            # A stride-0 (expanded) weight gives wrong gradients in channels-last batch norm.
            weight=scale.to(self.running_mean.dtype).repeat(self.num_features),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


class ConvNorm(nn.Module):
    """ReLU, 1×1 convolution, batch norm: brings a cell's input to the cell's channels."""

    def __init__(self, in_channels: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = ScaledNorm(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pointwise(x.relu()))


class Rectified(nn.Module):
    """An operation that begins with a ReLU.

    `forward` is its definition. A cell, which knows that all edges leaving a state begin with the
    same ReLU, takes that once and calls `after_relu`; where the edges have stride 2 it also sorts
    the pixels once, with `phases`, and calls `on_phases`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(x.relu())


def phases(x: Tensor) -> Tensor:
    """The four 2×2 phases of an image as channels: (N, C, H, W) to (N, 4 C, ⌈H/2⌉, ⌈W/2⌉).

    Channel block 2 i + j holds the pixels (2 y + i, 2 x + j). A stride-2 convolution on `x` is a
    stride-1 convolution on its phases, for which libraries have much faster kernels, above all
    backward. An odd height or width is continued by zeros, as the convolutions' padding is.
    """
    x = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


class FactorizedReduce(Rectified):
    """Halves height and width: ReLU, two 1×1 stride-2 convolutions on shifted grids, batch norm."""

    def __init__(self, in_channels: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, channels - channels // 2, 1, stride=2, bias=False)
        self.norm = ScaledNorm(channels, affine=affine)

    def after_relu(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        # The shift keeps the size, so that both grids have equally many points if it is odd.
        shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1), scale)

    def on_phases(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        even, _, _, odd = x.chunk(4, dim=1)
        even = nn.functional.conv2d(even, self.even.weight)
        odd = nn.functional.conv2d(odd, self.odd.weight)
        return self.norm(torch.cat([even, odd], dim=1), scale)


class DepthwiseSeparable(Rectified):
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
        self.norm = ScaledNorm(channels, affine=affine)

    def after_relu(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(x)), scale)

    def on_phases(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """With dilation 2 all taps meet the first phase, as the taps of an undilated kernel;
        without, each tap meets one phase, and the pointwise convolution adds up the four."""
        kernel, pointwise = self.depthwise.weight, self.pointwise.weight
        if self.depthwise.dilation[0] == 2:
            x = x[:, : len(kernel)].contiguous(memory_format=torch.channels_last)
        else:
            kernel, pointwise = _phase_kernels(kernel), pointwise.repeat(1, 4, 1, 1)
        x = nn.functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return self.norm(nn.functional.conv2d(x, pointwise), scale)


def _phase_kernels(kernel: Tensor) -> Tensor:
    """A stride-2 depthwise kernel, (C, 1, k, k) with k 3 or 5, for the `phases` of its input.

    Output y reads the pixels 2 y − 2 … 2 y + 3 with a kernel centred in 6 taps (zeros outside k);
    tap 2 t + i meets phase i at offset t − 1, which makes three taps for each phase.

    Returns:
        (4 C, 1, 3, 3).
    """
    before = (5 - kernel.shape[-1]) // 2
    taps = nn.functional.pad(kernel, (before, before + 1, before, before + 1))
    by_phase = taps.reshape(len(kernel), 3, 2, 3, 2).permute(2, 4, 0, 1, 3)
    return by_phase.reshape(4 * len(kernel), 1, 3, 3)


class SepConv(Rectified):
    """Two depthwise separable convolutions; the first one carries the stride."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.first = DepthwiseSeparable(channels, kernel, stride, 1, affine)
        self.second = DepthwiseSeparable(channels, kernel, 1, 1, affine)

    def after_relu(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.second.after_relu(self.first.after_relu(x).relu(), scale)

    def on_phases(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.second.after_relu(self.first.on_phases(x).relu(), scale)


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
        self.norm = ScaledNorm(channels, affine=False)

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
