"""Batch norm, of one operation or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssnas import kernels
from ssnas.distributed import active, gather


class Norm(nn.BatchNorm2d):
    """Batch norm of (N, C) or (N, C, H, W), by `batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm([self], x)


def batch_norm(norms: Sequence[nn.BatchNorm2d], x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Several batch norms, side by side, as one.

    scale · (x − mean) / std is batch norm with `scale` as its affine weight, so that a mixed
    operation's w(α)·o(x) needs no pass over memory of its own.

    Several processes share the batch statistics, those of all their parts of a batch together.

    Args:
        norms: E batch norms of C channels, all with or all without affine parameters.
        x: (N, E C) or (N, E C, H, W): the input of each in its block of channels.
        scale: (E,), for norms without affine parameters: what multiplies the result of each.

    Raises:
        ValueError: for affine norms with a scale.
    """
    first = norms[0]
    recording = first.training and first.track_running_stats
    mean = var = None
    if recording or not first.training:
        mean = joined([norm.running_mean for norm in norms])
        var = joined([norm.running_var for norm in norms])
    weight, bias = affine_of(norms, scale)
    if first.training and active():
        result = _synchronised(x, mean, var, weight, bias, first.momentum, first.eps)
    else:
        result = nn.functional.batch_norm(
            x, mean, var, weight, bias, first.training, first.momentum, first.eps
        )
    if recording:
        record_statistics(norms, mean, var)
    return result


def _synchronised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, over the parts of all processes.

    Mean and variance of W equal parts follow from those of each without loss of digits (Chan,
    Golub and LeVeque 1979): mean = (1/W) Σ mean_r, var = (1/W) Σ (var_r + (mean_r − mean)²).
    """
    given = x.dtype
    # bfloat16 has too few digits for statistics.
    x = x.to(torch.promote_types(given, torch.float32))
    var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    means, variances = gather(torch.stack([mean, var])[None]).unbind(1)
    mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    if running_mean is not None:
        count = len(means) * x.numel() / x.shape[1]
        running_mean.lerp_(mean.detach(), momentum)
        running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (-1, *[1] * (x.ndim - 2))
    return (x * factor.view(shape) + offset.view(shape)).to(given)


def affine_of(
    norms: Sequence[nn.BatchNorm2d], scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What multiplies the normalised channels, (E C,), and what is added; None for 1 and 0.

    Raises:
        ValueError: for affine norms with a scale.
    """
    first = norms[0]
    if not first.affine:
        if scale is None:
            return None, None
        # A stride-0 (expanded) weight gives wrong gradients in channels-last batch norm.
        return scale.to(first.running_mean.dtype).repeat_interleave(first.num_features), None
    if scale is not None:
        raise ValueError("a scale would hide the weight of an affine batch norm")
    return joined([norm.weight for norm in norms]), joined([norm.bias for norm in norms])


@torch.no_grad()
def record_statistics(norms: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor) -> None:
    """Write running statistics, (E C,), into the norms that they belong to."""
    for norm, own_mean, own_var in zip(
        norms, mean.chunk(len(norms)), var.chunk(len(norms)), strict=True
    ):
        if own_mean.data_ptr() != norm.running_mean.data_ptr():
            norm.running_mean.copy_(own_mean)
            norm.running_var.copy_(own_var)
        norm.num_batches_tracked.add_(1)


@torch.no_grad()
def record_batch(norms: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor, count: int) -> None:
    """Let norms that track statistics record those of a batch of `count` values a channel.

    Args:
        mean, var: (E C,), the variance biased; the norms record the unbiased one.
    """
    if not norms[0].track_running_stats:
        return
    means = [norm.running_mean for norm in norms]
    variances = [norm.running_var for norm in norms]
    unbiased = var * (count / (count - 1))
    torch._foreach_lerp_(means, list(mean.chunk(len(norms))), norms[0].momentum)
    torch._foreach_lerp_(variances, list(unbiased.chunk(len(norms))), norms[0].momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def in_passing(norms: Sequence[nn.BatchNorm2d], x: Tensor) -> bool:
    """Whether `ssnas.kernels` normalise x while they read it for something else.

    They do in training, with the statistics of one process.
    """
    return norms[0].training and not active() and kernels.usable(x)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, by the compiled kernels.

    Args:
        x: (N, C, H, W), channels-last.

    Raises:
        ValueError: for a single value a channel, which has no variance.
    """
    channels = x.shape[1]
    if x.numel() == channels:
        raise ValueError(f"batch norm needs more than one value a channel; found {tuple(x.shape)}")
    mean, var = x.new_empty(channels), x.new_empty(channels)
    kernels.call("moments", x.dtype, x.numel() // channels, channels, x, mean, var)
    return mean, var


def factors(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Batch norm as factor · x + offset, each (C,)."""
    factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    return factor, -mean * factor if bias is None else bias - mean * factor


def norm_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of a batch norm in training for x, weight and bias, those that are `asked`."""
    return torch.ops.aten.native_batch_norm_backward(
        *(gradient, x, weight, None, None, mean, (var + eps).rsqrt(), True, eps, list(asked))
    )


@dataclass(frozen=True)
class Term:
    """scale · batch_norm(norms, x); see `batch_norm`."""

    norms: Sequence[nn.BatchNorm2d]
    x: Tensor
    scale: Tensor | None = None


def normalised_sum(terms: Sequence[Term]) -> Tensor:
    """Σ_k scale_k · (x_k − mean_k) / std_k: the mixed operation of one state and several edges.

    Args:
        terms: of equal shapes, (N, E C, H, W).
    """
    if not all(in_passing(term.norms, term.x) for term in terms):
        total = batch_norm(terms[0].norms, terms[0].x, terms[0].scale)
        for term in terms[1:]:
            total = total.add_(batch_norm(term.norms, term.x, term.scale))
        return total
    xs = [term.x.contiguous(memory_format=torch.channels_last) for term in terms]
    affine = [affine_of(term.norms, term.scale) for term in terms]
    weights, biases = zip(*affine, strict=True)
    total, *statistics = _NormalisedSum.apply(terms[0].norms[0].eps, *xs, *weights, *biases)
    means, variances = statistics[: len(terms)], statistics[len(terms) :]
    for term, mean, var in zip(terms, means, variances, strict=True):
        record_batch(term.norms, mean, var, total.numel() // total.shape[1])
    return total


class _NormalisedSum(torch.autograd.Function):
    """`normalised_sum` by the compiled kernels; also returns the means and variances."""

    @staticmethod
    def forward(ctx, eps: float, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        xs, weights, biases = (tensors[i : i + count] for i in (0, count, 2 * count))
        means, variances = zip(*map(moments, xs), strict=True)
        applied = [
            factors(mean, var, eps, weight, bias)
            for mean, var, weight, bias in zip(means, variances, weights, biases, strict=True)
        ]
        offset = torch.stack([offset for _, offset in applied]).sum(dim=0)
        total, channels = torch.empty_like(xs[0]), xs[0].shape[1]
        rows = total.numel() // channels
        multipliers = [factor for factor, _ in applied]
        sizes = (count, rows, channels)
        kernels.call("weighted_sum", total.dtype, *sizes, list(xs), multipliers, offset, total)
        ctx.save_for_backward(*xs, *weights, *means, *variances)
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(*means, *variances)
        return total, *means, *variances

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        count, saved, needs = ctx.count, ctx.saved_tensors, ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * (3 * count)
        for k in range(count):
            x, weight, mean, var = saved[k::count]
            found[k::count] = norm_gradients(
                gradient, x, weight, mean, var, ctx.eps, needs[k::count]
            )
        return None, *found
