"""Batch norm, of one operation or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssnas.engine.op_group import Normalise
from ssnas.runtime.distributed import active, gather


class Norm(nn.BatchNorm2d):
    """Batch norm of (N, C) or (N, C, H, W), over the batches of all processes.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> Norm(1)(x).detach().flatten().round(decimals=3)
        tensor([-1.,  1.])
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"batch norm takes (N, C) or (N, C, H, W); found {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if self.training and active():
            return batch_norm([self], x)
        return super().forward(x)

    def lower(self) -> Normalise:
        return Normalise(self)


def batch_norm(norms: Sequence[nn.BatchNorm2d], x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Apply several batch norms, side by side, as one.

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
        result, batch_mean, batch_var, count = _synchronised(x, weight, bias, first.eps)
        if first.track_running_stats:
            parts = batch_mean.chunk(len(norms)), batch_var.chunk(len(norms))
            record_batch(norms, *parts, count)
        return result
    recording = first.training and first.track_running_stats
    mean: Tensor | None = None
    var: Tensor | None = None
    if recording or not first.training:
        means, variances, _ = zip(*map(statistics_of, norms), strict=True)
        mean, var = joined(means), joined(variances)
    result = nn.functional.batch_norm(
        x, mean, var, weight, bias, first.training, momentum_of(first), first.eps
    )
    if recording and mean is not None and var is not None:
        record_statistics(norms, mean, var)
    return result


def statistics_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean, running variance and number of batches of a norm.

    Raises:
        TypeError: if it has none.
    """
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or batches is None:
        raise TypeError(f"found a batch norm without running statistics: {norm}")
    return mean, var, batches


def momentum_of(norm: nn.BatchNorm2d) -> float:
    """The momentum of the running statistics.

    Raises:
        TypeError: for a cumulative average, whose momentum is None.
    """
    return float(norm.momentum)  # type: ignore[arg-type]  # None raises the TypeError


def _synchronised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Batch norm in training over the parts of all processes, with what `record_batch` records.

    Mean and variance of W equal parts follow from those of each without loss of digits (Chan,
    Golub and LeVeque 1979): mean = (1/W) Σ mean_r, var = (1/W) Σ (var_r + (mean_r − mean)²).
    """
    dtype = x.dtype
    # bfloat16 has too few digits for statistics.
    x = x.to(torch.promote_types(dtype, torch.float32))
    var, mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != 1], correction=0)
    means, variances = gather(torch.stack([mean, var])[None]).unbind(1)
    mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    factor, offset = factors(mean, var, eps, weight, bias)
    shape = (-1, *[1] * (x.ndim - 2))
    result = (x * factor.view(shape) + offset.view(shape)).to(dtype)
    return result, mean, var, len(means) * x.numel() // x.shape[1]


def affine_of(
    norms: Sequence[nn.BatchNorm2d], scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The weights and biases of several norms, (E C,) each; None for 1 and 0.

    Weights without affine parameters are those of `scale`.

    Raises:
        ValueError: for affine norms with a scale.
    """
    first = norms[0]
    check_scale(norms, scale)
    if not first.affine:
        if scale is None:
            return None, None
        # A stride-0 (expanded) weight gives wrong gradients in channels-last batch norm.
        dtype = statistics_of(first)[0].dtype
        return scale.to(dtype).repeat_interleave(first.num_features), None
    return joined([norm.weight for norm in norms]), joined([norm.bias for norm in norms])


def check_scale(norms: Sequence[nn.BatchNorm2d], scale: Tensor | None) -> None:
    """Raise ValueError for affine norms with a scale."""
    if scale is not None and norms[0].affine:
        raise ValueError("a scale would hide the weight of an affine batch norm")


@torch.no_grad()
def record_statistics(norms: Sequence[nn.BatchNorm2d], mean: Tensor, var: Tensor) -> None:
    """Write running statistics, (E C,), into the norms that they belong to."""
    statistics = zip(mean.chunk(len(norms)), var.chunk(len(norms)), strict=True)
    for norm, (norm_mean, norm_var) in zip(norms, statistics, strict=True):
        running_mean, running_var, batches = statistics_of(norm)
        if norm_mean.data_ptr() != running_mean.data_ptr():
            running_mean.copy_(norm_mean)
            running_var.copy_(norm_var)
        batches.add_(1)


@torch.no_grad()
def record_batch(
    norms: Sequence[nn.BatchNorm2d],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    count: int,
) -> None:
    """Let norms record the statistics of a batch of `count` values a channel.

    Args:
        means, variances: of each norm, the variance biased; the norms record the unbiased one.
    """
    unbiased = torch._foreach_mul(list(variances), count / (count - 1))
    momentum = momentum_of(norms[0])
    running_means, running_vars, batches = zip(*map(statistics_of, norms), strict=True)
    torch._foreach_lerp_(list(running_means), list(means), momentum)
    torch._foreach_lerp_(list(running_vars), list(unbiased), momentum)
    torch._foreach_add_(list(batches), 1)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; a single tensor stays itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def factors(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Batch norm as factor · x + offset, each (C,)."""
    factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    return factor, -mean * factor if bias is None else bias - mean * factor
