"""Mixed operations by the compiled kernels: `mixed` says what they compute.

One autograd function computes all states of a cell, in which nothing is written to memory but those
and the results of convolutions and poolings, before their batch norms:

- a separable convolution passes over a band of image rows at a time, whose depthwise result never
  leaves the cache and is computed again in backward;
- batch norm and ReLU are applied while the next operation reads, and so is the gradient of a batch
  norm, since by channel both are affine;
- all terms of a state are normalised, weighted and added up in one pass, and all gradients for a
  state are added up where they arise.

The gradients have no gradients of their own; PyTorch says so when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssnas import kernels
from ssnas.norms import affine_of, check_scale, record_batch
from ssnas.operations import ConvNorm, DepthwiseSeparable, FactorizedReduce, Pool
from ssnas.terms import Term


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
    """The tensors, besides the states, that gradients flow to."""

    def __init__(self) -> None:
        self._found: list[Callable[[], Sequence[Tensor]]] = []
        self._count = 0

    def add(self, count: int, found: Callable[[], Sequence[Tensor]]) -> slice:
        """Where they are to be found among all."""
        self._found.append(found)
        self._count += count
        return slice(self._count - count, self._count)

    def tensors(self) -> list[Tensor]:
        """All, as they are now."""
        return [tensor for found in self._found for tensor in found()]


class _Norms:
    """Batch norms of a result, side by side, applied by whatever reads it."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d], inputs: Inputs) -> None:
        self.norms = norms
        self.affine = inputs.add(2, partial(affine_of, norms)) if norms[0].affine else None

    @property
    def training(self) -> bool:
        return self.norms[0].training

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
        return moments, self.norms[0].eps, *affine


_NO_NORM = (None, 0.0, None, None)


def _record(batches: Sequence[tuple[_Norms, Tensor, int]]) -> None:
    """Let norms that track statistics record their mean and variance of so many pixels."""
    for count in {pixels for _, _, pixels in batches}:
        owners, means, variances = [], [], []
        for norms, moments, pixels in batches:
            if pixels == count and norms.training and norms.norms[0].track_running_stats:
                blocks = moments.split(norms.norms[0].num_features)
                half = len(blocks) // 2
                copies = len(norms.norms) // half
                owners += norms.norms
                means += blocks[:half] * copies
                variances += blocks[half:] * copies
        if owners:
            record_batch(owners, means, variances, count)


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
    """What the backward pass of a state starts from, and what it finds.

    Args:
        needed: for each of `tensors` whether its gradient is.

    Attributes:
        state: the state.
        of_state: the gradient for it, or None where it is not needed.
        adds: whether the next part adds to it, or writes it.
        found: the gradients for `tensors`.
    """

    def __init__(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self.tensors, self.needed = tensors, needed
        self.state: Tensor | None = None
        self.of_state: Tensor | None = None
        self.adds = True
        self.found: list[Tensor | None] = [None] * len(tensors)

    def needs(self, *places: slice | None) -> bool:
        return any(any(self.needed[where]) for where in places if where is not None)


class Part:
    """A term on some edges: how it comes from its state, and how its gradient returns there.

    Args:
        inputs: takes its tensors.
        norms: at its end.

    Attributes:
        start: index of its first edge among those of all parts.
        inputs: where its tensors are.
    """

    whole = False
    """Whether `backward` can write the gradient for all of the state, instead of adding to it."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        self.term, self.edges = term, term.edges
        self.norms = None if term.norms is None else _Norms(term.norms, inputs)
        self.start = 0

    def forward(
        self, state: Tensor, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """The result, with norms its mean and variance, and what `backward` needs besides.

        The result has C channels where all edges have the same, or else C for each.
        """
        raise NotImplementedError

    def batches(
        self, y: Tensor, moments: Tensor | None, kept: Sequence[Tensor]
    ) -> list[tuple[_Norms, Tensor, int]]:
        """All norms, each with the mean and variance of its batch, and its pixels."""
        return [] if self.norms is None else [(self.norms, moments, _pixels(y))]

    def learns(self, to: _Backward) -> bool:
        """Whether a gradient for one of its tensors is needed."""
        return self.norms is not None and to.needs(self.norms.affine)

    def backward(self, given: _Given, kept: Sequence[Tensor], to: _Backward) -> None:
        """Take the gradient for the result to the state and the tensors."""
        raise NotImplementedError


class State(Part):
    """The state itself."""

    whole = True

    def forward(self, state, tensors):
        return state, None, ()

    def backward(self, given, kept, to):
        if to.of_state is not None:
            given.write(to.of_state, adds=to.adds)


class Pooled(Part):
    """A 3×3 pooling, the same for all edges."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        pool = term.ops[0].pool
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
    """Separable convolutions, one layer after another, each with batch norms."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        *others, last = term.layers
        self.layers = [
            *(_Layer(ops, _Norms([op.norm for op in ops], inputs), inputs) for ops in others),
            _Layer(last, self.norms, inputs),
        ]

    def forward(self, state, tensors):
        y, moments = self.layers[0].forward(state, _NO_NORM, tensors)
        kept = []
        for before, layer in pairwise(self.layers):
            kept += y, moments
            y, moments = layer.forward(y, before.norms.applied(moments, tensors), tensors)
        return y, moments, kept

    def batches(self, y, moments, kept):
        """Only the first layer has a stride, so all results are of one size."""
        found = zip(self.layers, [*kept[1::2], moments], strict=True)
        return [(layer.norms, own, _pixels(y)) for layer, own in found]

    def learns(self, to):
        return any(layer.learns(to) for layer in self.layers)

    def backward(self, given, kept, to):
        if to.of_state is None and not self.learns(to):
            return
        for before, layer in reversed(list(pairwise(self.layers))):
            *kept, x, moments = kept
            given = layer.backward(given, x, to, torch.empty_like(x), before.norms, moments)
        self.layers[0].backward(given, to.state, to, to.of_state)

    @property
    def whole(self):
        """With stride and dilation 2 all taps meet the even pixels alone."""
        first = self.term.layers[0][0]
        return not first.stride == first.dilation == 2


class Projected(Part):
    """Pointwise convolutions of relu(x), with batch norms.

    Their joint kernel is (E C', C, 1, 1); at stride 2 (E C', 2 C, 1, 1), for the even pixels of x
    and, beside them, those diagonally after, and each channel reads only one of both.
    """

    whole = True

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        joint_kernel, ops = term.ops[0].joint_kernel, term.ops
        self.kernel = inputs.add(1, lambda: [joint_kernel(ops).contiguous()])
        self.stride = term.ops[0].stride

    def forward(self, state, tensors):
        (kernel,) = tensors[self.kernel]
        y = _result(state, len(kernel), self.stride)
        moments, written = self.norms.moments(y)
        sizes = self._shape(state), len(kernel)
        kernels.call("project", y.dtype, *sizes, state, kernel, y, written)
        return y, moments, ()

    def _shape(self, state: Tensor) -> kernels.Shape:
        return _shape(state, len(self.edges), True, 1, self.stride, 1)

    def learns(self, to):
        return to.needs(self.kernel) or super().learns(to)

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

    def __init__(self, ops: Sequence[DepthwiseSeparable], norms: _Norms, inputs: Inputs) -> None:
        # Autograd follows these copies; made within `_Mixed`, it would not.
        self.depthwise = inputs.add(
            len(ops), lambda: [op.depthwise.weight.contiguous() for op in ops]
        )
        self.pointwise = inputs.add(
            len(ops), lambda: [op.pointwise.weight.contiguous() for op in ops]
        )
        self.norms = norms
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
            *(of_x, to.adds, *of_norms, *of_weights),
        )
        if norms is None:
            return None
        return _Given(of_x.chunk(self.edges, dim=1), width, x, slopes)


def _part(term: Term, inputs: Inputs) -> Part:
    match term.ops[0]:
        case nn.Identity():
            return State(term, inputs)
        case Pool():
            return Pooled(term, inputs)
        case ConvNorm() | FactorizedReduce():
            return Projected(term, inputs)
    return Convolved(term, inputs)


class Plan:
    """What there is to compute, whatever the tensors are.

    Args: see `mixed.Graph`.

    Attributes:
        parts: the terms.
        inputs: what the parts need besides the states.
        edges: of all parts.
        leaving: the parts that read each state, in the order in which they are computed.
        entering: those that each sum consists of.
        channels: of each sum; where no part has norms, those of the states.
        weighted: indices of the edges that have a weight.
        touched: for each sum whether it is entered or read; another one stays as it is.
    """

    def __init__(self, terms: Sequence[Term], given: int, sums: int) -> None:
        self.given, self.sums, self.inputs = given, sums, Inputs()
        self.parts = parts = [_part(term, self.inputs) for term in terms]
        self.edges, self.weighted = 0, []
        for part in parts:
            part.start, self.edges = self.edges, self.edges + len(part.edges)
            if part.term.weighted:
                self.weighted += range(part.start, self.edges)
        # One that writes the whole gradient for the state goes first.
        ordered = sorted(parts, key=lambda part: not part.whole)
        self.leaving = [
            [part for part in ordered if part.term.source == state] for state in range(given + sums)
        ]
        self.entering = [[part for part in parts if i in part.edges] for i in range(sums)]
        self.touched = [
            bool(entering or leaving)
            for entering, leaving in zip(self.entering, self.leaving[given:], strict=True)
        ]
        normed = [part.norms.norms[0] for part in parts if part.norms is not None]
        self.channels = normed[0].num_features if normed else None

    def wanted(self, of_states: Sequence[bool], of_scale: bool, to: _Backward) -> list[bool]:
        """Whether the gradient for each state is needed, for itself or for what it comes from."""
        found = list(of_states)
        for i, entering in enumerate(self.entering):
            found[self.given + i] |= any(
                found[part.term.source] or part.learns(to) or (of_scale and part.term.weighted)
                for part in entering
            )
        return found


def mix(
    plan: Plan,
    given: Sequence[Tensor],
    before: Sequence[Tensor | None],
    scale: Tensor | None,
) -> list[Tensor | None]:
    """x_j = before_j + Σ_i (weight_i · x̂_i + bias_i), over the parts i that enter x_j.

    Args:
        given: the first states, (N, C, H, W).
        before: of each other state, or None for zeros.
        scale: for the weighted edges, one after the other, the weight; or None, where that is a
            parameter of a norm, or 1.

    Raises:
        ValueError: for affine norms with a scale, or a scale of another length.
        TypeError: for tensors of several types.
    """
    if scale is not None and len(scale) != len(plan.weighted):
        raise ValueError(f"{len(plan.weighted)} edges need as many weights; found {len(scale)}")
    for part in plan.parts:
        if part.norms is not None and part.term.weighted:
            check_scale(part.norms.norms, scale)
    tensors = [
        *map(_dense, given),
        None if scale is None else scale.contiguous(),
        *(
            None if own is None or not touched else _dense(own)
            for own, touched in zip(before, plan.touched, strict=True)
        ),
        *plan.inputs.tensors(),
    ]
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(types) > 1:
        raise TypeError(
            f"mixed operations need tensors of one type; found {sorted(map(str, types))}"
        )
    sums = zip(_Mixed.apply(plan, *tensors), plan.touched, before, strict=True)
    return [new if touched else old for new, touched, old in sums]


class _Terms:
    """All edges with their results, as the kernels read them."""

    def __init__(self, plan: Plan, channels: int, scale: Tensor | None) -> None:
        self.channels, self.scale = channels, scale
        self.array = (kernels.Term * plan.edges)()
        for part in plan.parts:
            for i, edge in enumerate(part.edges):
                self.array[part.start + i].sum = edge
        if scale is not None:
            start, size = scale.data_ptr(), scale.element_size()
            for position, edge in enumerate(plan.weighted):
                self.array[edge].scale = start + position * size

    def set(self, part: Part, y: Tensor, moments: Tensor | None, tensors: Sequence[Tensor]) -> None:
        """Enter a part's result, with norms its mean and variance, for all of its edges."""
        width, norms = y.shape[1], part.norms
        size = self.channels * y.element_size()
        own = 0 if width == self.channels else size
        moments, eps, weight, bias = _NO_NORM if norms is None else norms.applied(moments, tensors)
        start = y.data_ptr()
        for i in range(len(part.edges)):
            term = self.array[part.start + i]
            term.x, term.width = start + i * own, width
            term.slot = part.start + (i if own else 0)
            term.eps, term.fixed = eps, norms is None or not norms.training
            if moments is not None:
                term.mean = moments.data_ptr() + i * own
                term.var = term.mean + width * y.element_size()
            if weight is not None:
                term.weight = weight.data_ptr() + i * size
                term.bias = bias.data_ptr() + i * size

    def call(self, function: str, x: Tensor, index: int, *arguments) -> None:
        """Call a kernel with the terms of one sum x."""
        sizes = len(self.array), index, self.channels, _pixels(x)
        kernels.call(function, x.dtype, self.array, *sizes, *arguments)


class _Mixed(torch.autograd.Function):
    """`mix` of dense tensors."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        given, (scale, *rest) = tensors[: plan.given], tensors[plan.given :]
        before, tensors = rest[: plan.sums], rest[plan.sums :]
        states = [*given, *[None] * plan.sums]
        channels = plan.channels or states[0].shape[1]
        terms = _Terms(plan, channels, scale)
        sizes: list[Tensor | None] = list(before)
        batches, kept, ctx.kept = [], [], {}
        for index, leaving in enumerate(plan.leaving):
            i = index - plan.given
            if i >= 0 and sizes[i] is not None:
                states[index] = _result(sizes[i], channels)
                terms.call("mix", states[index], i, before[i], states[index])
            for part in leaving:
                y, moments, own = part.forward(states[index], tensors)
                terms.set(part, y, moments, tensors)
                for edge in part.edges:
                    sizes[edge] = y
                batches += part.batches(y, moments, own)
                ctx.kept[part] = slice(len(kept), len(kept) + 2 + len(own))
                kept += y, moments, *own
        _record(batches)
        ctx.plan, ctx.channels, ctx.inputs = plan, channels, len(tensors)
        ctx.save_for_backward(scale, *states, *tensors, *kept)
        ctx.set_materialize_grads(False)
        return tuple(states[plan.given :])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        plan, channels = ctx.plan, ctx.channels
        scale, *saved = ctx.saved_tensors
        count = plan.given + plan.sums
        states, saved = saved[:count], saved[count:]
        tensors, saved = saved[: ctx.inputs], saved[ctx.inputs :]
        _, *needs = ctx.needs_input_grad
        needs_scale = needs.pop(plan.given)
        of_states, needs = needs[:count], needs[count:]
        to = _Backward(tensors, needs)
        terms = _Terms(plan, channels, scale)
        for part, where in ctx.kept.items():
            y, moments, *_ = saved[where]
            terms.set(part, y, moments, tensors)
        wanted = plan.wanted(of_states, needs_scale, to)
        factors = states[0].new_zeros(3, plan.edges * channels)
        of_weight, of_bias = states[0].new_zeros(2, plan.edges * channels)
        found: list[Tensor | None] = [None] * count
        for index in reversed(range(count)):
            i, leaving = index - plan.given, plan.leaving[index]
            outer = gradients[i] if i >= 0 else None
            to.state, to.of_state = states[index], None
            to.adds = outer is not None or not any(part.whole for part in leaving)
            if wanted[index] and states[index] is not None:
                to.of_state = _start(states[index], outer, bool(leaving), to.adds)
            for part in leaving:
                y, _, *own = saved[ctx.kept[part]]
                where = slice(part.start * channels, (part.start + len(part.edges)) * channels)
                if part.norms is not None and part.norms.affine is not None:
                    to.found[part.norms.affine] = of_weight[where], of_bias[where]
                beyond = [found[plan.given + edge] for edge in part.edges]
                if all(own is not None for own in beyond):
                    part.backward(_Given(beyond, channels, y, factors[:, where]), own, to)
                    to.adds = True
            found[index] = to.of_state
            if i >= 0 and to.of_state is not None:
                terms.call("mix_backward", to.of_state, i, to.of_state, factors, of_weight, of_bias)
        of_scale = None
        if needs_scale:
            of_scale = of_weight.view(plan.edges, channels).sum(1)[plan.weighted]
        found = [own if need else None for own, need in zip(found, of_states, strict=True)]
        return None, *found[: plan.given], of_scale, *found[plan.given :], *to.found


def _start(state: Tensor, outer: Tensor | None, read: bool, adds: bool) -> Tensor:
    """The gradient for a state, before that of the parts that read it is added."""
    if outer is None:
        return torch.zeros_like(state) if adds else torch.empty_like(state)
    return outer.clone(memory_format=torch.channels_last) if read else _dense(outer)
