"""Depthwise separable convolutions of several operations at once: the search's hot path.

y = pointwise(depthwise(relu(x))). PyTorch computes it by three kernels that write two results of
the size of x to memory and keep them for backward, and a search step, which keeps thousands of
them, waits for memory far longer than it computes. On a CPU, `ssnas.kernels` pass over a band of
image rows at a time, whose intermediate results never leave the cache, and compute them again in
backward: main memory sees x and y alone. A batch norm before the ReLU is applied in passing too.
Everywhere else, or without a C++ compiler, it is a composition of PyTorch's functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ssnas import kernels
from ssnas.norms import (
    affine_of,
    batch_norm,
    factors,
    in_passing,
    joined,
    moments,
    norm_gradients,
    record_batch,
)


class Source:
    """What several operations read.

    Args:
        x: (N, C, H, W), which all of them read, or (N, E C, H, W), where each of E operations
            reads its own block of channels.
        blocks: 1, or E.
        norms: E batch norms that come before the operations, or None.
    """

    def __init__(
        self, x: Tensor, blocks: int = 1, norms: Sequence[nn.BatchNorm2d] | None = None
    ) -> None:
        self.x, self.blocks, self.norms = x, blocks, norms
        self._rectified: dict[int, Tensor] = {}

    @cached_property
    def state(self) -> Tensor:
        """x, after the batch norms."""
        return self.x if self.norms is None else batch_norm(self.norms, self.x)

    def rectified(self, count: int = 1) -> Tensor:
        """relu(state), `count` times side by side if it has no blocks; computed once."""
        if not self._rectified:
            self._rectified[self.blocks] = self.state.relu()
        if count not in self._rectified:
            self._rectified[count] = torch.cat([self._rectified[1]] * count, dim=1)
        return self._rectified[count]


def separable(
    source: Source,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    stride: int,
    dilation: int,
) -> Tensor:
    """pointwise(depthwise(relu(state))) of E operations, side by side.

    Args:
        source: what they read.
        depthwise: E kernels (C, 1, k, k), k 3 or 5; the padding is dilation · (k − 1) / 2.
        pointwise: E kernels (C, C, 1, 1).
        stride, dilation: of the depthwise convolution.

    Returns:
        (N, E C, ⌈H / stride⌉, ⌈W / stride⌉).
    """
    first, second = joined(depthwise), joined(pointwise)
    how = _How(source.blocks, len(depthwise), stride, dilation)
    if not kernels.usable(source.x) or source.x.dtype != first.dtype:
        return _composed(source.rectified(how.count), first, second, how)
    # Autograd follows these copies; made within the functions below, it would not.
    both = first.contiguous(), second.contiguous()
    norms = source.norms
    if norms is None or not in_passing(norms, source.x):
        x = source.state.contiguous(memory_format=torch.channels_last)
        return _Separable.apply(x, *both, how)
    x = source.x.contiguous(memory_format=torch.channels_last)
    how = replace(how, eps=norms[0].eps)
    y, mean, var = _NormalisedSeparable.apply(x, *affine_of(norms), *both, how)
    record_batch(norms, mean, var, x.numel() // x.shape[1])
    return y


@dataclass(frozen=True)
class _How:
    """Blocks and operations as of `Source`; stride and dilation; ε of the batch norm before."""

    blocks: int
    count: int
    stride: int
    dilation: int
    eps: float | None = None


def _composed(x: Tensor, depthwise: Tensor, pointwise: Tensor, how: _How) -> Tensor:
    """By PyTorch's convolutions, of a rectified x that has a block for each operation."""
    padding = how.dilation * (depthwise.shape[-1] // 2)
    x = conv2d(x, depthwise, None, how.stride, padding, how.dilation, len(depthwise))
    return conv2d(x, pointwise, groups=how.count)


def _shape(x: Tensor, depthwise: Tensor, how: _How) -> kernels.Shape:
    """With stride and dilation 2 all taps meet the even pixels, as the taps of a plain kernel that
    reads those alone."""
    n, channels, height, width = x.shape
    step = 2 if how.stride == how.dilation == 2 else 1
    return kernels.Shape(
        *(n, height, width, (height - 1) // step + 1, (width - 1) // step + 1, step),
        *(channels // how.blocks, how.count, how.blocks != how.count, depthwise.shape[-1]),
        *(how.stride // step, how.dilation // step),
    )


_Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]
"""x, the factor and offset of its channels or None, the depthwise and the pointwise kernels."""


def _forward(inputs: _Inputs, how: _How) -> Tensor:
    """`separable` of factor · x + offset."""
    x, _, _, depthwise, _ = inputs
    n, _, height, width = x.shape
    size = (n, len(depthwise), (height - 1) // how.stride + 1, (width - 1) // how.stride + 1)
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    kernels.call("forward", x.dtype, _shape(x, depthwise, how), *inputs, y)
    return y


def _backward(
    gradient: Tensor, inputs: _Inputs, how: _How, of_x: bool, of_kernels: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for factor · x + offset, the depthwise and the pointwise kernels."""
    x, _, _, depthwise, pointwise = inputs
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    shape, found = _shape(x, depthwise, how), [None, None, None]
    if of_x:
        # The kernels write the pixels that they read.
        found[0] = torch.empty_like(x) if shape.step == 1 else torch.zeros_like(x)
    if of_kernels:
        found[1:] = torch.empty_like(depthwise), torch.empty_like(pointwise)
    kernels.call("backward", x.dtype, shape, *inputs, gradient, *found)
    return tuple(found)


class _Separable(torch.autograd.Function):
    """`separable` by the compiled kernels, of dense tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, depthwise: Tensor, pointwise: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(x, depthwise, pointwise)
        ctx.how = how
        return _forward((x, None, None, depthwise, pointwise), how)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors
        if torch.is_grad_enabled():
            y = _by_definition(ctx.how, *saved)
            return *kernels.differentiable_gradients(y, saved, needs[:3], gradient), None
        x, depthwise, pointwise = saved
        inputs = (x, None, None, depthwise, pointwise)
        return *_backward(gradient, inputs, ctx.how, needs[0], needs[1] or needs[2]), None


class _NormalisedSeparable(torch.autograd.Function):
    """`separable` of a batch norm of x, dense; also returns the norm's mean and variance."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        depthwise: Tensor,
        pointwise: Tensor,
        how: _How,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = moments(x)
        applied = factors(mean, var, how.eps, weight, bias)
        ctx.save_for_backward(x, weight, bias, depthwise, pointwise, mean, var, *applied)
        ctx.how = how
        ctx.mark_non_differentiable(mean, var)
        return _forward((x, *applied, depthwise, pointwise), how), mean, var

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors
        if torch.is_grad_enabled():
            y = _normalised_by_definition(ctx.how, *saved[:5])
            return *kernels.differentiable_gradients(y, saved[:5], needs[:5], gradient), None
        x, weight, _, depthwise, pointwise, mean, var, *applied = saved
        of_norm, *of_kernels = _backward(
            gradient,
            (x, *applied, depthwise, pointwise),
            ctx.how,
            any(needs[:3]),
            needs[3] or needs[4],
        )
        of_input = [None] * 3
        if of_norm is not None:
            of_input = norm_gradients(of_norm, x, weight, mean, var, ctx.how.eps, needs[:3])
        return *of_input, *of_kernels, None


def _by_definition(how: _How, x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    return _composed(Source(x, how.blocks).rectified(how.count), depthwise, pointwise, how)


def _normalised_by_definition(
    how: _How, x: Tensor, weight: Tensor | None, bias: Tensor | None, *both: Tensor
) -> Tensor:
    state = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=how.eps)
    return _by_definition(how, state, *both)
