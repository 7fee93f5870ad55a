"""Operations as the engine sees them: plain descriptions, in groups that share their input.

An operation describes itself by a method `lower`, which returns one of the classes below. One that
has none, or whose `forward` was overridden since, is computed by its own `forward`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class Skip:
    """The state itself."""

    norm = None

    @property
    def signature(self) -> Hashable:
        return ()

    @property
    def supported(self) -> bool:
        return True


@dataclass(frozen=True)
class Zero:
    """Zeros of the state's size, or of half of it at stride 2."""

    stride: int
    norm = None

    @property
    def signature(self) -> Hashable:
        return (self.stride,)

    @property
    def supported(self) -> bool:
        return True


@dataclass(frozen=True)
class Normalise:
    """Batch norm of the state."""

    norm: nn.BatchNorm2d

    @property
    def signature(self) -> Hashable:
        return _norm_signature(self.norm)

    @property
    def supported(self) -> bool:
        return isinstance(self.norm, nn.BatchNorm2d)


@dataclass(frozen=True)
class Pool:
    """3×3 pooling with padding 1, then batch norm."""

    pool: nn.MaxPool2d | nn.AvgPool2d
    norm: nn.BatchNorm2d

    @property
    def signature(self) -> Hashable:
        return type(self.pool), self.pool.stride, *_norm_signature(self.norm)

    @property
    def supported(self) -> bool:
        pool = self.pool
        if isinstance(pool, nn.MaxPool2d):
            plain = pool.dilation == 1 and not pool.return_indices
        else:
            plain = not pool.count_include_pad and pool.divisor_override is None
        sizes = pool.kernel_size, pool.padding, pool.ceil_mode
        # One result serves all poolings of a state, so none may have parameters of its own.
        norm = isinstance(self.norm, nn.BatchNorm2d) and not self.norm.affine
        return plain and norm and sizes == (3, 1, False)


@dataclass(frozen=True)
class Project:
    """ReLU, 1×1 convolution, batch norm.

    At stride 2 there are two convolutions of half of the channels each: of the even pixels, and of
    those diagonally after them.
    """

    convolutions: tuple[nn.Conv2d, ...]
    norm: nn.BatchNorm2d

    @property
    def stride(self) -> int:
        return len(self.convolutions)

    @property
    def signature(self) -> Hashable:
        sizes = tuple((c.in_channels, c.out_channels) for c in self.convolutions)
        return sizes, *_norm_signature(self.norm)

    @property
    def supported(self) -> bool:
        return all(map(_is_plain, self.convolutions)) and isinstance(self.norm, nn.BatchNorm2d)


@dataclass(frozen=True)
class SeparableLayer:
    """ReLU, depthwise convolution, pointwise convolution, batch norm."""

    depthwise: nn.Conv2d
    pointwise: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def channels(self) -> int:
        return self.depthwise.in_channels

    @property
    def kernel(self) -> int:
        return self.depthwise.kernel_size[0]

    @property
    def stride(self) -> int:
        return self.depthwise.stride[0]

    @property
    def dilation(self) -> int:
        return self.depthwise.dilation[0]


@dataclass(frozen=True)
class Separable:
    """Depthwise separable convolutions, one layer after another."""

    layers: tuple[SeparableLayer, ...]

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.layers[-1].norm

    @property
    def signature(self) -> Hashable:
        return tuple(
            (layer.kernel, layer.stride, layer.dilation, *_norm_signature(layer.norm))
            for layer in self.layers
        )

    @property
    def supported(self) -> bool:
        """The kernels know 3×3 and 5×5, plain or of dilation 2, each at stride 1 or 2."""
        return all(
            _is_plain(layer.depthwise)
            and layer.depthwise.groups == layer.depthwise.out_channels == layer.channels
            and layer.depthwise.padding[0] == layer.dilation * (layer.kernel - 1) // 2
            and _is_plain(layer.pointwise)
            and isinstance(layer.norm, nn.BatchNorm2d)
            and layer.kernel in (3, 5)
            and layer.dilation in (1, 2)
            and layer.stride in (1, 2)
            for layer in self.layers
        )


Description = Skip | Zero | Normalise | Pool | Project | Separable


@runtime_checkable
class Lowered(Protocol):
    """An operation that describes itself to the engine."""

    def lower(self) -> Description: ...


def describe(op: nn.Module) -> Description | None:
    """The engine's description of an operation, or None for one that it does not know.

    Example:
        >>> describe(nn.Identity())
        Skip()
        >>> describe(nn.Conv2d(4, 4, 7)) is None
        True
    """
    if type(op) is nn.Identity:
        return Skip()
    if type(op) is nn.BatchNorm2d:
        return Normalise(op)
    if not isinstance(op, Lowered) or _overrides_forward(op):
        return None
    description = op.lower()
    return description if description.supported else None


def _overrides_forward(op: nn.Module) -> bool:
    """Tell whether `forward` was replaced below the class whose `lower` describes it."""
    if "forward" in vars(op):
        return True
    kinds = type(op).__mro__
    definers = [next(kind for kind in kinds if name in vars(kind)) for name in ("forward", "lower")]
    return kinds.index(definers[0]) < kinds.index(definers[1])


def _is_plain(convolution: nn.Module) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
    )


def _norm_signature(norm: Any) -> tuple[Hashable, ...]:
    return norm.num_features, norm.affine


@dataclass(frozen=True)
class OpGroup:
    """Operations of one kind on edges that leave the same states.

    Args:
        ops: of equal channels, kernels and strides; `nn.Identity` for the state itself, a batch
            norm for the state behind it.
        targets: for each of them the state that it is added to.
        sources: the state that all of them read, or several of one size, whose channels follow
            each other.
        weighted: whether a weight w_o multiplies each operation's output.
    """

    ops: Sequence[nn.Module]
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    weighted: bool = True

    @cached_property
    def described(self) -> list[Description] | None:
        """The operations' descriptions; None if the engine does not know one of them."""
        descriptions = [describe(op) for op in self.ops]
        known = [description for description in descriptions if description is not None]
        return known if len(known) == len(descriptions) else None

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        """The batch norms at the operations' ends; none if the operations have none."""
        norms = [op.norm for op in self.described or ()]
        return [norm for norm in norms if norm is not None]

    @property
    def shares(self) -> bool:
        """True for several poolings of one state, of which the engine computes one for all."""
        pools = self.described is not None and isinstance(self.described[0], Pool)
        return pools and len(self.ops) > 1

    def agrees(self) -> bool:
        """Tell whether one result serves all operations of a group that `shares`.

        Poolings of one state see the same batches, so that their running statistics are equal
        unless somebody has set them. In training the batch's own statistics count.
        """
        first, *others = self.norms
        if first.training or first.running_mean is None:
            return True
        return all(
            torch.equal(mine, theirs)
            for norm in others
            for mine, theirs in zip(first.buffers(), norm.buffers(), strict=True)
            if mine.ndim
        )

    @property
    def layers(self) -> list[list[SeparableLayer]]:
        """The operations' separable convolutions, side by side, one layer after another."""
        separable = [op.layers for op in self.described or () if isinstance(op, Separable)]
        return [list(layers) for layers in zip(*separable, strict=True)]
