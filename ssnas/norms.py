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
    weight, bias = affine_of(norms, scale)
    if first.training and active():
        result, *batch = _synchronised(x, weight, bias, first.eps)
        record_batch(norms, *batch)
        return result
    recording = first.training and first.track_running_stats
    mean = var = None
    if recording or not first.training:
        mean = joined([norm.running_mean for norm in norms])
        var = joined([norm.running_var for norm in norms])
    result = nn.functional.batch_norm(
        x, mean, var, weight, bias, first.training, first.momentum, first.eps
    )
    if recording:
        record_statistics(norms, mean, var)
    return result


def _synchronised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Batch norm in training over the parts of all processes, with what `record_batch` records.

    Mean and variance of W equal parts follow from those of each without loss of digits (Chan,
    Golub and LeVeque 1979): mean = (1/W) Σ mean_r, var = (1/W) Σ (var_r + (mean_r − mean)²).
    """
    given = x.dtype
    # bfloat16 has too few digits for statistics.
    x = x.to(torch.promote_types(given, torch.float32))
    var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    means, variances = gather(torch.stack([mean, var])[None]).unbind(1)
    mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    factor, offset = factors(mean, var, eps, weight, bias)
    shape = (-1, *[1] * (x.ndim - 2))
    result = (x * factor.view(shape) + offset.view(shape)).to(given)
    return result, mean, var, len(means) * x.numel() // x.shape[1]


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


def in_passing(norms: Sequence[nn.BatchNorm2d] | None, x: Tensor) -> bool:
    """Whether `ssnas.kernels` normalise x, if it has norms, while they read it for something else.

    They do in training, with the statistics of one process.
    """
    return kernels.usable(x) and (norms is None or (norms[0].training and not active()))


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
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients for x, weight and bias, those that are `asked`, by the compiled kernels.

    Args:
        gradient: (N, E C, H, W), of E copies side by side of a batch norm in training, each with
            a weight and bias of its own; without `mean` and `var`, of weight · x.
        x: (N, C, H, W), what they normalise.
        weight: (E C,), or None for 1.
        mean, var: (C,).
    """
    channels, wide = x.shape[1], gradient.shape[1]
    scale = None if var is None else (var + eps).rsqrt()
    of_x = torch.empty_like(x) if asked[0] else None
    of_weight, of_bias = x.new_empty(wide), x.new_empty(wide)
    sizes = (x.numel() // channels, channels, wide // channels)
    tensors = (gradient, x, mean, scale, weight, of_x, of_weight, of_bias)
    kernels.call("norm_backward", x.dtype, *sizes, *tensors)
    found = (of_x, of_weight, of_bias)
    return tuple(tensor if wanted else None for tensor, wanted in zip(found, asked, strict=True))


@dataclass(frozen=True)
class Term:
    """scale · batch_norm(norms, x) of E edges, side by side; see `batch_norm`.

    Args:
        x: (N, E C, H, W), or (N, C, H, W) where all edges have the same, and so the same batch
            statistics.
        norms: E batch norms, or None where x is taken as it is.
        scale: (E,), or None for 1.
    """

    x: Tensor
    norms: Sequence[nn.BatchNorm2d] | None = None
    scale: Tensor | None = None

    def computed(self, wide: int) -> Tensor:
        """The term by PyTorch's functions, (N, E C, H, W) for `wide` E C channels."""
        if self.norms is not None and self.x.shape[1] == wide:
            return batch_norm(self.norms, self.x, self.scale)
        value = self.x
        if self.norms is not None:
            first, *others = self.norms
            value = batch_norm([first], value)
            if first.training and first.track_running_stats:
                for other in others:
                    record_statistics([other], first.running_mean, first.running_var)
        value = torch.cat([value] * (wide // self.x.shape[1]), dim=1)
        return value if self.scale is None else value * self.affine(wide)[0][:, None, None]

    def affine(self, wide: int) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of each channel, (E C,), or None for 1 and 0."""
        if self.norms is not None:
            return affine_of(self.norms, self.scale)
        if self.scale is None:
            return None, None
        return self.scale.repeat_interleave(wide // len(self.scale)), None


def normalised_sum(terms: Sequence[Term], wide: int) -> Tensor:
    """Σ_k scale_k · (x_k − mean_k) / std_k: what one state brings to E edges, side by side.

    Args:
        terms: one for each kind of operation.
        wide: E C.

    Returns:
        (N, E C, H, W).
    """
    if not all(in_passing(term.norms, term.x) for term in terms):
        total = terms[0].computed(wide)
        for term in terms[1:]:
            total = total + term.computed(wide)
        return total
    xs = [term.x.contiguous(memory_format=torch.channels_last) for term in terms]
    weights, biases = zip(*(term.affine(wide) for term in terms), strict=True)
    eps = [None if term.norms is None else term.norms[0].eps for term in terms]
    total, *statistics = _NormalisedSum.apply(wide, eps, *xs, *weights, *biases)
    for term, mean, var in zip(terms, statistics[::2], statistics[1::2], strict=True):
        if term.norms is not None:
            count = term.x.numel() // term.x.shape[1]
            record_batch(term.norms, _repeated(mean, wide), _repeated(var, wide), count)
    return total


def _repeated(statistic: Tensor, wide: int) -> Tensor:
    return statistic if len(statistic) == wide else statistic.repeat(wide // len(statistic))


class _NormalisedSum(torch.autograd.Function):
    """`normalised_sum` by the compiled kernels; also returns each term's mean and variance."""

    @staticmethod
    def forward(
        ctx, wide: int, eps: Sequence[float | None], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        count = len(eps)
        xs, weights, biases = (tensors[i : i + count] for i in (0, count, 2 * count))
        statistics, multipliers, offset = [], [], xs[0].new_zeros(wide)
        for x, weight, bias, own in zip(xs, weights, biases, eps, strict=True):
            mean, var = (None, None) if own is None else moments(x)
            statistics += [mean, var]
            if own is None:
                multipliers.append(x.new_ones(wide) if weight is None else weight)
            else:
                statistic = _repeated(mean, wide), _repeated(var, wide)
                factor, shift = factors(*statistic, own, weight, bias)
                multipliers.append(factor)
                offset += shift
        n, _, height, width = xs[0].shape
        total = torch.empty(
            (n, wide, height, width), dtype=offset.dtype, memory_format=torch.channels_last
        )
        sizes = (count, n * height * width, wide, [x.shape[1] for x in xs])
        kernels.call("weighted_sum", total.dtype, *sizes, list(xs), multipliers, offset, total)
        ctx.save_for_backward(*xs, *weights, *biases, *statistics)
        ctx.wide, ctx.eps = wide, eps
        ctx.mark_non_differentiable(*(value for value in statistics if value is not None))
        return total, *statistics

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count, needs = len(ctx.eps), ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors
        tensors, statistics = saved[: 3 * count], saved[3 * count :]
        if torch.is_grad_enabled():
            total = _by_definition(ctx.wide, ctx.eps, tensors)
            found = kernels.differentiable_gradients(total, tensors, needs, gradient)
            return None, None, *found
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        found: list[Tensor | None] = [None] * (3 * count)
        for k, eps in enumerate(ctx.eps):
            x, weight, _bias = tensors[k::count]
            mean, var = statistics[2 * k : 2 * k + 2]
            found[k::count] = norm_gradients(
                gradient, x, weight, mean, var, eps or 0.0, needs[k::count]
            )
        return None, None, *found


def _by_definition(
    wide: int, eps: Sequence[float | None], tensors: Sequence[Tensor | None]
) -> Tensor:
    """`_NormalisedSum` by PyTorch's functions."""
    total = 0
    for k, own in enumerate(eps):
        x, weight, bias = tensors[k :: len(eps)]
        if own is not None:
            x = nn.functional.batch_norm(x, None, None, training=True, eps=own)
        x = torch.cat([x] * (wide // x.shape[1]), dim=1)
        x = x if weight is None else x * weight[:, None, None]
        total = total + (x if bias is None else x + bias[:, None, None])
    return total
