"""Groups of operations by PyTorch's functions: on an accelerator, or without compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ssnas.engine.batch_norm import batch_norm, joined, record_statistics, statistics_of
from ssnas.engine.op_group import Normalise, OpGroup, Pool, Project, SeparableLayer


class Readings:
    """A tensor that several operations read, and its ReLU, computed once.

    Args:
        x: (N, C, H, W), which all of them read, or (N, E C, H, W), where each of E operations
            reads its own block of channels.
        blocks: 1, or E.
    """

    def __init__(self, x: Tensor, blocks: int = 1) -> None:
        self.x, self.blocks = x, blocks
        self._rectified: dict[int, Tensor] = {}

    def rectified(self, count: int = 1) -> Tensor:
        """relu(x), `count` times side by side if x has no blocks."""
        if not self._rectified:
            self._rectified[self.blocks] = self.x.relu()
        if count not in self._rectified:
            self._rectified[count] = torch.cat([self._rectified[1]] * count, dim=1)
        return self._rectified[count]


def add_groups(
    states: list[Tensor | None], x: Tensor, leaving: Sequence[tuple[OpGroup, Tensor | None]]
) -> None:
    """Add the outputs of the groups that read x to their targets, in place.

    Args:
        states: all states so far, None for those that nothing has entered yet.
        x: (N, C, H, W), what the groups read.
        leaving: the groups, each with the weights w_o of its targets, or None for 1.
    """
    readings = Readings(x)
    totals: dict[tuple[int, ...], Tensor] = {}
    for group, scale in leaving:
        value = _side_by_side(group, readings, scale)
        total = totals.get(group.targets)
        totals[group.targets] = value if total is None else total + value
    for targets, total in totals.items():
        if len(targets) == 1 and states[targets[0]] is None:
            states[targets[0]] = total
            continue
        for target, part in zip(targets, total.chunk(len(targets), dim=1), strict=True):
            states[target] = accumulate(states[target], part)


def accumulate(total: Tensor | None, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """`total` + `scale` · `value`, in place where there is a total.

    Example:
        >>> accumulate(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor(2.0)).flatten()
        tensor([3., 3.])
    """
    if total is None:
        return value.clone(memory_format=torch.channels_last) if scale is None else value * scale
    return total.add_(value) if scale is None else total.addcmul_(value, scale)


def concatenated(states: Sequence[Tensor]) -> Tensor:
    """Concatenate channels; the gradients of the parts are dense."""
    return states[0] if len(states) == 1 else _Concatenate.apply(*states)


def _side_by_side(group: OpGroup, readings: Readings, scale: Tensor | None) -> Tensor:
    """The group's weighted outputs side by side, (N, E C, H', W')."""
    ops, norms = group.described, group.norms
    if ops is None:
        return _one_by_one(group, readings.x, scale)
    first = ops[0]
    if isinstance(first, Normalise):
        return batch_norm(norms, readings.x, scale)
    if isinstance(first, Project):
        pixels = readings.x if first.stride == 1 else _BothGrids.apply(readings.x)
        projections = [op for op in ops if isinstance(op, Project)]
        return batch_norm(norms, conv2d(pixels.relu(), joint_kernel(projections)), scale)
    if layers := group.layers:
        value = _separable(readings, layers[0])
        for before, layer in pairwise(layers):
            between = batch_norm([op.norm for op in before], value)
            value = _separable(Readings(between, len(layer)), layer)
        return batch_norm(norms, value, scale)
    if isinstance(first, Pool):
        norm, *others = norms
        value = batch_norm([norm], first.pool(readings.x))
        if norm.training and norm.track_running_stats:
            mean, var, _ = statistics_of(norm)
            for other in others:
                record_statistics([other], mean, var)
    else:
        value = group.ops[0](readings.x)
    channels = value.shape[1]
    value = torch.cat([value] * len(ops), dim=1)
    return value if scale is None else value * scale.repeat_interleave(channels)[:, None, None]


def _one_by_one(group: OpGroup, x: Tensor, scale: Tensor | None) -> Tensor:
    """Operations that the engine does not know, each by its own `forward`."""
    values = [op(x) for op in group.ops]
    if scale is not None:
        values = [weight * value for weight, value in zip(scale, values, strict=True)]
    return torch.cat(values, dim=1)


def joint_kernel(ops: Sequence[Project]) -> Tensor:
    """One kernel for E projections side by side.

    Returns:
        (E C', C, 1, 1) at stride 1; at stride 2 (E C', 2 C, 1, 1), for the even pixels and, beside
        them, those diagonally after. There each row reads one of both, so half of it is zero.
    """
    if ops[0].stride == 1:
        return joined([op.convolutions[0].weight for op in ops])
    inputs = ops[0].convolutions[0].in_channels
    kernels = []
    for op in ops:
        even, odd = op.convolutions
        kernels += [
            pad(even.weight, (0, 0, 0, 0, 0, inputs)),
            pad(odd.weight, (0, 0, 0, 0, inputs, 0)),
        ]
    return torch.cat(kernels)


def _separable(readings: Readings, ops: Sequence[SeparableLayer]) -> Tensor:
    """Separable convolutions side by side, before their batch norms."""
    first = ops[0].depthwise
    depthwise = joined([op.depthwise.weight for op in ops])
    pointwise = joined([op.pointwise.weight for op in ops])
    x = readings.rectified(len(ops))
    x = conv2d(x, depthwise, None, first.stride, first.padding, first.dilation, len(depthwise))
    return conv2d(x, pointwise, groups=len(ops))


class _Concatenate(torch.autograd.Function):
    """Concatenation of channels whose gradients are dense.

    PyTorch returns the gradients as slices of one tensor; its batch norm's backward is twenty times
    slower on those, and many of them start from each node.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        parts = gradient.split(ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


class _BothGrids(torch.autograd.Function):
    """The even pixels and those diagonally after them, (N, C, H, W) to (N, 2 C, ⌈H/2⌉, ⌈W/2⌉).

    PyTorch's own backward of two slices writes two whole images of zeros and adds them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape
        odd = pad(x[:, :, 1::2, 1::2], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return torch.cat([x[:, :, ::2, ::2], odd], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        n, channels, height, width = ctx.size
        even, odd = gradient.split(channels, dim=1)
        x = gradient.new_zeros((n, height, width, channels)).permute(0, 3, 1, 2)
        x[:, :, ::2, ::2] = even
        x[:, :, 1::2, 1::2] = odd[:, :, : height // 2, : width // 2]
        return x
