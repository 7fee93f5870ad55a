"""Mixed operations by the compiled kernels: `mixed` says what they compute.

Between a state and the sums of the nodes that its edges enter nothing is written to memory but the
results of convolutions and poolings, before their batch norms:

- a separable convolution passes over a band of image rows at a time, whose depthwise result never
  leaves the cache and is computed again in backward;
- batch norm and ReLU are applied while the next operation reads, and so is the gradient of a batch
  norm, since by channel both are affine;
- the terms of all operations are normalised, weighted and added to the nodes in one pass, and all
  gradients for the state are added up where they arise.

The gradients have no gradients of their own; PyTorch says so when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssnas import kernels
from ssnas.norms import affine_of, check_scale, record_batch
from ssnas.operations import DepthwiseSeparable


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _result(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    n, _, height, width = x.shape
    size = (n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


def _shape(
    x: Tensor, operations: int, shared: bool, kernel: int, stride: int, dilation: int
) -> kernels.Shape:
    """With stride and dilation 2 all taps meet the even pixels, as the taps of a plain kernel that
    reads those alone."""
    n, read, height, width = x.shape
    step = 2 if stride == dilation == 2 else 1
    return kernels.Shape(
        *(n, height, width, (height - 1) // step + 1, (width - 1) // step + 1, step),
        *(read if shared else read // operations, operations, shared, kernel),
        *(stride // step, dilation // step),
    )


class Inputs:
    """The tensors, besides the state, that gradients flow to."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def add(self, *tensors: Tensor) -> slice:
        """Where they are to be found among all."""
        start = len(self.tensors)
        self.tensors += tensors
        return slice(start, len(self.tensors))


class _Norms:
    """Batch norms of a result, side by side, applied by whatever reads it."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d], inputs: Inputs) -> None:
        first = norms[0]
        self.norms, self.eps, self.training = norms, first.eps, first.training
        self.affine = inputs.add(*affine_of(norms)) if first.affine else None

    def moments(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and variance of y, one after the other, and what a kernel must write them into.

        Raises:
            ValueError: for a single value a channel, which has no variance.
        """
        if self.training:
            if _pixels(y) == 1:
                found = tuple(y.shape)
                raise ValueError(f"batch norm needs more than one value a channel; found {found}")
            moments = y.new_empty(2 * y.shape[1])
            return moments, moments
        blocks = self.norms[: y.shape[1] // self.norms[0].num_features]
        means = [norm.running_mean for norm in blocks]
        return torch.cat([*means, *(norm.running_var for norm in blocks)]), None

    def applied(self, moments: Tensor, tensors: Sequence[Tensor]) -> tuple:
        """Mean and variance, ε, weight and bias, None for 1 and 0."""
        affine = (None, None) if self.affine is None else tensors[self.affine]
        return moments, self.eps, *affine


_NO_NORM = (None, 0.0, None, None)


def _record(batches: Sequence[tuple[_Norms, Tensor]], pixels: int) -> None:
    """Let norms that track statistics record their mean and variance of so many pixels."""
    owners, means, variances = [], [], []
    for norms, moments in batches:
        if norms.training and norms.norms[0].track_running_stats:
            blocks = moments.split(norms.norms[0].num_features)
            half = len(blocks) // 2
            copies = len(norms.norms) // half
            owners += norms.norms
            means += blocks[:half] * copies
            variances += blocks[half:] * copies
    if owners:
        record_batch(owners, means, variances, pixels)


@dataclass(frozen=True)
class _Given:
    """A gradient for y that is computed when it is read: factor · beyond + slope · y + offset.

    Args:
        beyond: the gradient behind y's norms, of each edge.
        stride: values from one pixel of those to the next.
        factors: factor, slope and offset of each channel, (3, channels).
    """

    beyond: Sequence[Tensor]
    stride: int
    y: Tensor
    factors: Tensor

    def arguments(self) -> tuple:
        return self.beyond, self.stride, self.y, self.factors, self.factors.stride(0)

    def write(self, to: Tensor, adds: bool = False) -> Tensor:
        """Compute it, or add it to what there is."""
        sizes = _pixels(to), to.shape[1], len(self.beyond), self.beyond[0].shape[1]
        kernels.call("norm_backward", to.dtype, *sizes, *self.arguments(), adds, to)
        return to


class _Backward:
    """What a backward pass starts from, and what it finds.

    Args:
        needed: for each of `tensors` whether its gradient is.

    Attributes:
        of_state: the gradient for the state, or None where it is not needed.
        adds: whether parts add to it, or the only one writes it.
        found: the gradients for `tensors`.
    """

    def __init__(self, state: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.state, self.tensors, self.needed = state, tensors, needed
        self.of_state: Tensor | None = None
        self.adds = True
        self.found: list[Tensor | None] = [None] * len(tensors)

    def needs(self, *places: slice | None) -> bool:
        return any(any(self.needed[where]) for where in places if where is not None)


class Part:
    """A term on some edges: how it comes from the state, and how its gradient returns there.

    Args:
        edges: for each of them the index of the sum that it enters.
        norms: at its end.
    """

    whole = False
    """Whether `backward` can write the gradient for all of the state, instead of adding to it."""

    def __init__(self, edges: Sequence[int], norms: _Norms | None = None) -> None:
        self.edges, self.norms = edges, norms

    def forward(
        self, state: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """The result, with norms its mean and variance, and what `backward` needs besides.

        The result has C channels where all edges have the same, or else C for each.
        """
        raise NotImplementedError

    def batches(
        self, moments: Tensor | None, kept: Sequence[Tensor]
    ) -> list[tuple[_Norms, Tensor]]:
        """All norms, each with the mean and variance of its batch."""
        return [] if self.norms is None else [(self.norms, moments)]

    def backward(self, given: _Given, kept: Sequence[Tensor], to: _Backward) -> None:
        """Take the gradient for the result to the state and the tensors."""
        raise NotImplementedError


class State(Part):
    """The state itself."""

    def forward(self, state, tensors):
        return state, None, ()

    def backward(self, given, kept, to):
        if to.of_state is not None:
            given.write(to.of_state, adds=True)


class Pooled(Part):
    """A 3×3 pooling, the same for all edges."""

    def __init__(
        self,
        edges: Sequence[int],
        norms: Sequence[nn.BatchNorm2d],
        inputs: Inputs,
        pool: nn.MaxPool2d | nn.AvgPool2d,
    ) -> None:
        super().__init__(edges, _Norms(norms, inputs))
        self.stride, self.largest = pool.stride, isinstance(pool, nn.MaxPool2d)

    def forward(self, state, tensors):
        y = _result(state, state.shape[1], self.stride)
        moments, written = self.norms.moments(y)
        kernels.call("pool", y.dtype, self._shape(state), self.largest, state, y, written)
        return y, moments, ()

    def backward(self, given, kept, to):
        if to.of_state is not None:
            tensors = to.state, given.y, given.write(torch.empty_like(given.y)), to.of_state
            shape = self._shape(to.state)
            kernels.call("pool_backward", given.y.dtype, shape, self.largest, *tensors)

    def _shape(self, state: Tensor) -> kernels.Shape:
        return _shape(state, 1, True, 3, self.stride, 1)


class Convolved(Part):
    """Separable convolutions, one layer after another, each with batch norms.

    Args:
        layers: of each layer the convolutions of all edges.
    """

    def __init__(
        self, edges: Sequence[int], layers: Sequence[Sequence[DepthwiseSeparable]], inputs: Inputs
    ) -> None:
        self.layers = [_Layer(ops, inputs) for ops in layers]
        super().__init__(edges, self.layers[-1].norms)

    def forward(self, state, tensors):
        y, moments = self.layers[0].forward(state, _NO_NORM, tensors)
        kept = []
        for before, layer in pairwise(self.layers):
            kept += y, moments
            y, moments = layer.forward(y, before.norms.applied(moments, tensors), tensors)
        return y, moments, kept

    def batches(self, moments, kept):
        norms = [layer.norms for layer in self.layers]
        return list(zip(norms, [*kept[1::2], moments], strict=True))

    def backward(self, given, kept, to):
        if to.of_state is None and not any(layer.learns(to) for layer in self.layers):
            return
        for before, layer in reversed(list(pairwise(self.layers))):
            *kept, x, moments = kept
            given = layer.backward(given, x, to, torch.empty_like(x), before.norms, moments)
        self.layers[0].backward(given, to.state, to, to.of_state)


class Projected(Part):
    """Pointwise convolutions of relu(x), with batch norms.

    Args:
        kernel: of all edges, (E C', C, 1, 1); at stride 2 (E C', 2 C, 1, 1), for the even pixels
            of x and, beside them, those diagonally after.
    """

    def __init__(
        self,
        edges: Sequence[int],
        norms: Sequence[nn.BatchNorm2d],
        inputs: Inputs,
        kernel: Tensor,
        stride: int,
    ) -> None:
        super().__init__(edges, _Norms(norms, inputs))
        self.kernel, self.stride = inputs.add(kernel.contiguous()), stride
        self.whole = stride == 1

    def forward(self, state, tensors):
        (kernel,) = tensors[self.kernel]
        y = _result(state, len(kernel), self.stride)
        moments, written = self.norms.moments(y)
        sizes = self._shape(state), len(kernel)
        kernels.call("project", y.dtype, *sizes, state, kernel, y, written)
        return y, moments, ()

    def _shape(self, state: Tensor) -> kernels.Shape:
        return _shape(state, len(self.edges), True, 1, self.stride, 1)

    def backward(self, given, kept, to):
        (kernel,) = to.tensors[self.kernel]
        of_kernel = torch.empty_like(kernel) if to.needs(self.kernel) else None
        if of_kernel is not None or to.of_state is not None:
            kernels.call(
                "project_backward",
                *(kernel.dtype, self._shape(to.state), len(kernel), to.state, kernel),
                *(*given.arguments(), to.of_state, to.adds, of_kernel),
            )
            to.found[self.kernel] = [of_kernel]


class _Layer:
    """Separable convolutions of several edges side by side, with the batch norms behind them."""

    def __init__(self, ops: Sequence[DepthwiseSeparable], inputs: Inputs) -> None:
        # Autograd follows these copies; made within `_Mixed`, it would not.
        self.depthwise = inputs.add(*(op.depthwise.weight.contiguous() for op in ops))
        self.pointwise = inputs.add(*(op.pointwise.weight.contiguous() for op in ops))
        self.norms = _Norms([op.norm for op in ops], inputs)
        self.edges, self.first = len(ops), ops[0]

    def _shape(self, x: Tensor, shared: bool) -> kernels.Shape:
        kernel = self.first.depthwise.kernel_size[0]
        return _shape(x, self.edges, shared, kernel, self.first.stride, self.first.dilation)

    def forward(self, x: Tensor, before: tuple, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The result and its moments; `before`: see `_Norms.applied`."""
        shape = self._shape(x, before is _NO_NORM)
        y = _result(x, shape.operations * shape.channels, self.first.stride)
        moments, written = self.norms.moments(y)
        weights = tensors[self.depthwise], tensors[self.pointwise]
        kernels.call("forward", y.dtype, shape, x, *before, *weights, y, written)
        return y, moments

    def learns(self, to: _Backward) -> bool:
        return to.needs(self.depthwise, self.pointwise, self.norms.affine)

    def backward(
        self,
        given: _Given,
        x: Tensor,
        to: _Backward,
        of_x: Tensor | None,
        norms: _Norms | None = None,
        moments: Tensor | None = None,
    ) -> _Given | None:
        """Gradients for the kernels and for x.

        Args:
            x: what was read.
            of_x: what its gradient is added to; behind norms, the gradient for their result.
            norms, moments: of x.

        Returns:
            the gradient for x, if there are norms.
        """
        places = self.depthwise, self.pointwise
        weights = [to.tensors[where] for where in places]
        of_weights = [None, None]
        if to.needs(*places):
            of_weights = [own[0].new_empty(len(own), *own[0].shape) for own in weights]
            for where, own in zip(places, of_weights, strict=True):
                to.found[where] = own.unbind()
        shape = self._shape(x, norms is None)
        before, of_norms = _NO_NORM, (True, None, None, None)
        if norms is not None:
            width = x.shape[1]
            slopes, affine = x.new_empty(3, width), tuple(x.new_empty(2, width))
            before = norms.applied(moments, to.tensors)
            of_norms = not norms.training, slopes, *affine
            if norms.affine is not None:
                to.found[norms.affine] = affine
        kernels.call(
            "backward",
            *(x.dtype, shape, x, *before, *weights, *given.arguments()),
            *(of_x, *of_norms, *of_weights),
        )
        if norms is None:
            return None
        return _Given(of_x.chunk(self.edges, dim=1), width, x, slopes)


def mix(
    parts: Sequence[Part],
    inputs: Inputs,
    state: Tensor,
    sums: Sequence[Tensor | None],
    scale: Tensor | None,
    channels: int,
) -> tuple[Tensor, ...]:
    """sum_e + Σ_i (weight_i · x̂_i + bias_i), over the parts i that are for edge e.

    Args:
        parts: the terms.
        inputs: what they need besides the state.
        state: what they read, (N, C, H, W).
        sums: one for each edge that parts are for, or None for zeros.
        scale: for the edges of all parts, one after the other, the weight; or None, where that is
            a parameter of a norm, or 1.
        channels: of each sum.

    Raises:
        ValueError: for affine norms with a scale.
        TypeError: for tensors of several types.
    """
    for part in parts:
        if part.norms is not None:
            check_scale(part.norms.norms, scale)
    scale = None if scale is None else scale.contiguous()
    before = [None if total is None else _dense(total) for total in sums]
    tensors = [scale, *before, *inputs.tensors]
    types = {state.dtype, *(tensor.dtype for tensor in tensors if tensor is not None)}
    if len(types) > 1:
        raise TypeError(
            f"mixed operations need tensors of one type; found {sorted(map(str, types))}"
        )
    return _Mixed.apply(parts, channels, len(sums), _dense(state), *tensors)


class _Mixed(torch.autograd.Function):
    """`mix` of dense tensors."""

    @staticmethod
    def forward(ctx, parts, channels, count, state, scale, *tensors):
        sums, tensors = tensors[:count], tensors[count:]
        results, batches, kept, ctx.kept = [], [], [], []
        for part in parts:
            y, moments, own = part.forward(state, tensors)
            results.append((y, moments))
            batches += part.batches(moments, own)
            ctx.kept.append(slice(len(kept), len(kept) + 2 + len(own)))
            kept += y, moments, *own
        _record(batches, _pixels(y))
        new = [_result(y, channels) for _ in range(count)]
        arguments = _arguments(parts, results, channels, scale, tensors)
        kernels.call("mix", y.dtype, *arguments, _pixels(y), count, sums, new)
        ctx.parts, ctx.inputs = parts, len(tensors)
        ctx.save_for_backward(state, scale, *tensors, *kept)
        return tuple(new)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        parts, needs, count = ctx.parts, ctx.needs_input_grad, len(gradients)
        state, scale, *saved = ctx.saved_tensors
        tensors, saved = saved[: ctx.inputs], saved[ctx.inputs :]
        kept = [saved[where] for where in ctx.kept]
        gradients = [_dense(gradient) for gradient in gradients]
        channels = gradients[0].shape[1]
        arguments = _arguments(parts, [own[:2] for own in kept], channels, scale, tensors)
        edges = sum(len(part.edges) for part in parts)
        factors = state.new_empty(3, edges * channels)
        of_weight, of_bias = state.new_empty(2, edges * channels)
        found = factors, of_weight, of_bias
        rows = _pixels(gradients[0])
        kernels.call("mix_backward", state.dtype, *arguments, rows, gradients, *found)
        to, start = _Backward(state, tensors, needs[5 + count :]), 0
        to.adds = len(parts) > 1 or not parts[0].whole
        if needs[3]:
            to.of_state = torch.zeros_like(state) if to.adds else torch.empty_like(state)
        for part, (y, _, *own) in zip(parts, kept, strict=True):
            where = slice(start, start := start + len(part.edges) * channels)
            if part.norms is not None and part.norms.affine is not None:
                to.found[part.norms.affine] = of_weight[where], of_bias[where]
            beyond = [gradients[edge] for edge in part.edges]
            part.backward(_Given(beyond, channels, y, factors[:, where]), own, to)
        of_scale = of_weight.view(edges, channels).sum(1) if needs[4] else None
        of_sums = [own if need else None for own, need in zip(gradients, needs[5:], strict=False)]
        return None, None, None, to.of_state, of_scale, *of_sums, *to.found


def _arguments(
    parts: Sequence[Part],
    results: Sequence[Sequence[Tensor | None]],
    channels: int,
    scale: Tensor | None,
    tensors: Sequence[Tensor],
) -> tuple:
    """`Parts` of kernels.cpp."""
    ys, _ = zip(*results, strict=True)
    norms = [
        _NO_NORM if part.norms is None else part.norms.applied(moments, tensors)
        for part, (_, moments) in zip(parts, results, strict=True)
    ]
    moments, eps, weights, biases = zip(*norms, strict=True)
    return (
        *(len(parts), channels, [len(part.edges) for part in parts]),
        *([edge for part in parts for edge in part.edges], ys, [y.shape[1] for y in ys]),
        *(moments, eps, [part.norms is None or not part.norms.training for part in parts]),
        *(weights, biases, scale),
    )
