"""Mixed operations by the compiled kernels: `mixed` says what they compute.

One autograd function computes all states of a graph, as a rule that of all cells. Nothing is
written to memory but those and the results of convolutions and poolings, before their batch norms:

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
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssnas import kernels
from ssnas.memory import Memory
from ssnas.norms import affine_of, check_scale
from ssnas.operations import ConvNorm, DepthwiseSeparable, FactorizedReduce, Pool, Zero
from ssnas.terms import Term

_memory = Memory()


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _result(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    n, _, height, width = x.shape
    size = (n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return _memory.empty(size, x.dtype)


def _like(x: Tensor) -> Tensor:
    return _memory.empty(x.shape, x.dtype)


@cache
def _shape(
    size: torch.Size, operations: int, shared: bool, kernel: int, stride: int, dilation: int
) -> kernels.Shape:
    """With stride and dilation 2 all taps meet the even pixels, as the taps of a plain kernel that
    reads those alone."""
    n, read, height, width = size
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
            TypeError: for running statistics that the kernels cannot read and write with y.
        """
        for norm in self.norms:
            for own in (norm.running_mean, norm.running_var):
                if own.dtype != y.dtype or not own.is_cpu or not own.is_contiguous():
                    raise TypeError("running statistics must be dense, of the images' type")
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
    records, counts = [], []
    for norms, moments, pixels in batches:
        first = norms.norms[0]
        if not norms.training or not first.track_running_stats:
            continue
        width, size = len(moments) // 2, moments.element_size()
        blocks = width // first.num_features
        for i, norm in enumerate(norms.norms):
            mean = moments.data_ptr() + i % blocks * first.num_features * size
            own = norm.running_mean.data_ptr(), norm.running_var.data_ptr()
            found = mean, mean + width * size, first.num_features, pixels
            records.append(kernels.Record(first.momentum, *own, *found))
            counts.append(norm.num_batches_tracked)
    if records:
        array = (kernels.Record * len(records))(*records)
        kernels.call("record", batches[0][1].dtype, array, len(array))
        torch._foreach_add_(counts, 1)


@dataclass(frozen=True)
class _Given:
    """A gradient for y that is computed when it is read: factor · beyond + slope · y + offset.

    Args:
        beyond: the gradient behind y's norms, of each edge.
        stride: values from one pixel of those to the next.
        factors: factor, slope and offset of each channel, (3 or more, channels).
    """

    beyond: Sequence[Tensor]
    stride: int
    y: Tensor
    factors: Tensor

    def arguments(self) -> tuple:
        return self.beyond, self.stride, self.y, self.factors, self.factors.stride(0)

    def write(self, to: Tensor, adds: bool) -> None:
        """Compute it, or add it to what there is."""
        sizes = _pixels(to), to.shape[1], len(self.beyond), self.beyond[0].shape[1]
        kernels.call("norm_backward", to.dtype, *sizes, *self.arguments(), adds, to)


class _Backward:
    """What the backward pass starts from, and what it finds.

    Args:
        plan: what was computed.
        states: all.
        tensors: the other inputs.
        of_states, needed, of_scale: whether the gradients for those are needed, for themselves,
            and that for the weights.

    Attributes:
        wanted: for each state whether its gradient is needed, for itself or what it comes from.
        gradients: for the states, or None where there is nothing yet.
        found: for `tensors`.
    """

    def __init__(
        self,
        plan: Plan,
        states: Sequence[Tensor],
        tensors: Sequence[Tensor],
        of_states: Sequence[bool],
        needed: Sequence[bool],
        of_scale: bool,
    ) -> None:
        self.plan, self.states = plan, states
        self.tensors, self.needed = tensors, needed
        self.wanted = list(of_states)
        for state, entering in enumerate(plan.entering, plan.given):
            self.wanted[state] |= any(
                any(self.wanted[source] for source in part.sources)
                or part.learns(self)
                or (of_scale and part.term.weighted)
                for part in entering
            )
        self.gradients: list[Tensor | None] = [None] * len(states)
        self.found: list[Tensor | None] = [None] * len(tensors)

    def start(self, gradients: Sequence[Tensor | None]) -> None:
        """From those given for the sums, which may be others' too."""
        for state, gradient in enumerate(gradients, self.plan.given):
            if gradient is not None and self.wanted[state]:
                read = self.plan.read[state]
                self.gradients[state] = (
                    _like(gradient).copy_(gradient) if read else _dense(gradient)
                )

    def needs(self, *places: slice | None) -> bool:
        return any(any(self.needed[where]) for where in places if where is not None)

    def of_state(self, state: int, whole: bool = True) -> tuple[Tensor | None, bool]:
        """Where the gradient for a state belongs, None if it is not needed; and whether to add it.

        Args:
            whole: whether the caller can write all of it, instead of adding to what there is.
        """
        if not self.wanted[state]:
            return None, False
        adds = not whole or self.gradients[state] is not None
        if self.gradients[state] is None:
            new = _like(self.states[state])
            self.gradients[state] = new if whole else new.zero_()
        return self.gradients[state], adds


class Part:
    """A term: how it comes from the states that it reads, and how its gradient returns there.

    Args:
        inputs: takes its tensors.

    Attributes:
        norms: at its end, or None.
        start: index of its first target among those of all parts.
    """

    whole = True
    """Whether `backward` can write all of the gradient for what it reads, instead of adding."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        self.term, self.targets, self.sources = term, term.targets, term.sources
        self.norms = None if term.norms is None else _Norms(term.norms, inputs)
        self.start = 0

    def forward(
        self, states: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        """The result, with norms its mean and variance, and what `backward` needs besides.

        The result has C channels where all targets have the same, or else C for each.

        Args:
            states: those that it reads.
        """
        raise NotImplementedError

    def channels(self, y: Tensor) -> int:
        """C, of its result."""
        return y.shape[1] if self.norms is None else self.norms.norms[0].num_features

    def batches(
        self, y: Tensor, moments: Tensor | None, kept: Sequence[Tensor]
    ) -> list[tuple[_Norms, Tensor, int]]:
        """All norms, each with the mean and variance of its batch, and its pixels."""
        return [] if self.norms is None else [(self.norms, moments, _pixels(y))]

    def learns(self, to: _Backward) -> bool:
        """Whether a gradient for one of its tensors is needed."""
        return self.norms is not None and to.needs(self.norms.affine)

    def backward(self, given: _Given, kept: Sequence[Tensor], to: _Backward) -> None:
        """Take the gradient for the result to the states and the tensors."""
        raise NotImplementedError


class State(Part):
    """The state itself."""

    def forward(self, states, tensors):
        return states[0], None, ()

    def backward(self, given, kept, to):
        of_state, adds = to.of_state(*self.sources)
        if of_state is not None:
            given.write(of_state, adds)


class Normalised(State):
    """The state itself, with a batch norm."""

    def forward(self, states, tensors):
        (y,) = states
        moments, written = self.norms.moments(y)
        if written is not None:
            kernels.call("moments", y.dtype, _pixels(y), y.shape[1], y, written)
        return y, moments, ()


class Zeros(Part):
    """What enters a state that no other term enters."""

    def forward(self, states, tensors):
        (x,) = states
        return _result(x, x.shape[1], self.term.ops[0].stride).zero_(), None, ()

    def backward(self, given, kept, to):
        pass


class Pooled(Part):
    """A 3×3 pooling, the same for all targets."""

    whole = False

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        pool = term.ops[0].pool
        self.stride, self.largest = pool.stride, isinstance(pool, nn.MaxPool2d)

    def forward(self, states, tensors):
        (x,) = states
        y = _result(x, x.shape[1], self.stride)
        moments, written = self.norms.moments(y)
        kernels.call("pool", y.dtype, self._shape(x), self.largest, x, y, written)
        return y, moments, ()

    def backward(self, given, kept, to):
        of_state, _ = to.of_state(*self.sources, self.whole)
        if of_state is not None:
            x, of_y = to.states[self.sources[0]], _like(given.y)
            given.write(of_y, adds=False)
            tensors = x, given.y, of_y, of_state
            kernels.call("pool_backward", x.dtype, self._shape(x), self.largest, *tensors)

    def _shape(self, x: Tensor) -> kernels.Shape:
        return _shape(x.shape, 1, True, 3, self.stride, 1)


class Convolved(Part):
    """Separable convolutions, one layer after another, each with batch norms."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        *others, last = term.layers
        self.layers = [
            *(_Layer(ops, _Norms([op.norm for op in ops], inputs), inputs) for ops in others),
            _Layer(last, self.norms, inputs),
        ]

    def forward(self, states, tensors):
        y, moments = self.layers[0].forward(*states, _NO_NORM, tensors)
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
        (source,) = self.sources
        if not to.wanted[source] and not self.learns(to):
            return
        for before, layer in reversed(list(pairwise(self.layers))):
            *kept, x, moments = kept
            of_x = _like(x), False
            given = layer.backward(given, x, to, of_x, before.norms, moments)
        of_state = to.of_state(source, self.whole)
        self.layers[0].backward(given, to.states[source], to, of_state)

    @property
    def whole(self):
        """With stride and dilation 2 all taps meet the even pixels alone."""
        first = self.term.layers[0][0]
        return not first.stride == first.dilation == 2


class Projected(Part):
    """Pointwise convolutions of relu(x), with batch norms; x are the channels of all that is read.

    Their joint kernel is (E C', C, 1, 1); at stride 2 (E C', 2 C, 1, 1), for the even pixels of x
    and, beside them, those diagonally after, and each channel reads only one of both.
    """

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        joint_kernel, ops = term.ops[0].joint_kernel, term.ops
        self.kernel = inputs.add(1, lambda: [joint_kernel(ops).contiguous()])
        self.stride = term.ops[0].stride

    def forward(self, states, tensors):
        (kernel,) = tensors[self.kernel]
        y = _result(states[0], len(kernel), self.stride)
        moments, written = self.norms.moments(y)
        kernels.call("project", y.dtype, *self._sizes(states, kernel), states, kernel, y, written)
        return y, moments, ()

    def _sizes(self, states: Sequence[Tensor], kernel: Tensor) -> tuple:
        shape = _shape(states[0].shape, len(self.targets), True, 1, self.stride, 1)
        return shape, len(states), len(kernel)

    def learns(self, to):
        return to.needs(self.kernel) or super().learns(to)

    def backward(self, given, kept, to):
        (kernel,) = to.tensors[self.kernel]
        states = [to.states[source] for source in self.sources]
        of_states, adds = zip(*map(to.of_state, self.sources), strict=True)
        of_kernel = torch.empty_like(kernel) if to.needs(self.kernel) else None
        if of_kernel is None and not any(to.wanted[source] for source in self.sources):
            return
        kernels.call(
            "project_backward",
            *(kernel.dtype, *self._sizes(states, kernel), states, kernel, *given.arguments()),
            *(of_states, (kernels.Long * len(adds))(*adds), of_kernel),
        )
        to.found[self.kernel] = [of_kernel]


class _Layer:
    """Separable convolutions of several edges side by side, with the batch norms behind them."""

    def __init__(self, ops: Sequence[DepthwiseSeparable], norms: _Norms, inputs: Inputs) -> None:
        kinds = [op.depthwise for op in ops], [op.pointwise for op in ops]
        self.depthwise, self.pointwise = (
            # Autograd follows these copies; made within `_Mixed`, it would not.
            inputs.add(len(own), lambda own=own: [layer.weight.contiguous() for layer in own])
            for own in kinds
        )
        self.norms = norms
        self.edges, self.first = len(ops), ops[0]

    def _shape(self, x: Tensor, shared: bool) -> kernels.Shape:
        kernel = self.first.depthwise.kernel_size[0]
        return _shape(x.shape, self.edges, shared, kernel, self.first.stride, self.first.dilation)

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
        of_x: tuple[Tensor | None, bool],
        norms: _Norms | None = None,
        moments: Tensor | None = None,
    ) -> _Given | None:
        """Gradients for the kernels and for x.

        Args:
            x: what was read.
            of_x: where its gradient belongs, behind norms that for their result, and whether to
                add it.
            norms, moments: of x.

        Returns:
            the gradient for x, if there are norms.
        """
        places = self.depthwise, self.pointwise
        weights = [to.tensors[where] for where in places]
        of_weights = [None, None]
        if to.needs(*places):
            of_weights = [[torch.empty_like(weight) for weight in own] for own in weights]
            for where, own in zip(places, of_weights, strict=True):
                to.found[where] = own
        shape = self._shape(x, norms is None)
        before, of_norms = _NO_NORM, (True, None)
        if norms is not None:
            width = x.shape[1]
            factors = x.new_empty(5, width)
            before = norms.applied(moments, to.tensors)
            of_norms = not norms.training, factors
            if norms.affine is not None:
                to.found[norms.affine] = factors[3], factors[4]
        kernels.call(
            "backward",
            *(x.dtype, shape, x, *before, *weights, *given.arguments()),
            *(*of_x, *of_norms, *of_weights),
        )
        if norms is None:
            return None
        return _Given(of_x[0].chunk(self.edges, dim=1), width, x, factors)


def _part(term: Term, inputs: Inputs) -> Part:
    match term.ops[0]:
        case nn.Identity():
            return State(term, inputs)
        case nn.BatchNorm2d():
            return Normalised(term, inputs)
        case Zero():
            return Zeros(term, inputs)
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
        size: of how many targets all parts have together.
        leaving: the parts to compute when a state, the last one that they read, is there.
        entering: those that each sum consists of.
        weighted: indices of the targets that have a weight.
        read: for each state whether a part does.
        touched: for each sum whether it is entered or read; another one stays as it is.
    """

    def __init__(self, terms: Sequence[Term], given: int, sums: int) -> None:
        self.given, self.sums, self.inputs = given, sums, Inputs()
        self.parts = parts = [_part(term, self.inputs) for term in terms]
        self.size, self.weighted = 0, []
        for part in parts:
            part.start, self.size = self.size, self.size + len(part.targets)
            if part.term.weighted:
                self.weighted += range(part.start, self.size)
        # One that writes the whole gradient for what it reads goes first.
        ordered = sorted(parts, key=lambda part: not part.whole)
        states = range(given + sums)
        self.leaving = [
            [part for part in ordered if max(part.sources) == state] for state in states
        ]
        self.entering = [[part for part in parts if i in part.targets] for i in states[given:]]
        self.read = [any(i in part.sources for part in parts) for i in states]
        self.touched = [
            bool(entering) or read
            for entering, read in zip(self.entering, self.read[given:], strict=True)
        ]


def mix(
    plan: Plan,
    given: Sequence[Tensor],
    scale: Tensor | None,
    before: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """x_j = before_j + Σ_i (weight_i · x̂_i + bias_i), over the parts i that enter x_j.

    Args:
        given: the first states, (N, C, H, W).
        scale: for the weighted targets, one after the other, the weight; or None, where that is a
            parameter of a norm, or 1.
        before: of each other state, or None for zeros.

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
    types = {(t.dtype, t.is_cpu) for t in tensors if t is not None}
    if len(types) > 1:
        found = sorted(f"{dtype}{'' if is_cpu else ' elsewhere'}" for dtype, is_cpu in types)
        raise TypeError(f"mixed operations need tensors of one type on the CPU; found {found}")
    found = _Mixed.apply(plan, torch.is_grad_enabled(), *tensors)
    sums = zip(found, plan.touched, before, strict=True)
    return [new if touched else old for new, touched, old in sums]


class _Terms:
    """All parts' results, as the kernels read them.

    Attributes:
        places: of each part's channels, target by target, among those of all.
        channels: how many these are.
    """

    def __init__(self, plan: Plan, scale: Tensor | None) -> None:
        self.places, self.channels = {}, 0
        self._entering: dict[int, list[tuple[Tensor, int, Tensor | None]]] = {}
        # One that is not set yet has 0 as its sum, which is a given state.
        self.array = (kernels.Term * plan.size)()
        self._scales: list[int | None] = [None] * plan.size
        if scale is not None:
            for position, index in enumerate(plan.weighted):
                self._scales[index] = scale.data_ptr() + position * scale.element_size()

    def set(self, part: Part, y: Tensor, moments: Tensor | None, tensors: Sequence[Tensor]) -> None:
        """Enter a part's result, with norms its mean and variance, for all of its targets."""
        width, norms, channels = y.shape[1], part.norms, part.channels(y)
        first, size = self.channels, y.element_size()
        self.channels += len(part.targets) * channels
        self.places[part] = slice(first, self.channels)
        _, eps, *affine = _NO_NORM if norms is None else norms.applied(moments, tensors)
        fixed = norms is None or not norms.training
        x, mean, weight, bias = (t if t is None else t.data_ptr() for t in (y, moments, *affine))
        for i, target in enumerate(part.targets):
            # Its channels among all that are affine, and among those of the result.
            own, place = i * channels * size, first + i * channels
            block, slot = (0, first) if width == channels else (own, place)
            self._entering.setdefault(target, []).append((y, channels, moments))
            self.array[part.start + i] = kernels.Term(
                x + block,
                mean and mean + block,
                mean and mean + block + width * size,
                weight and weight + own,
                bias and bias + own,
                self._scales[part.start + i],
                eps,
                *(fixed, width, target, place, slot),
            )

    def mix(self, state: int, before: Tensor | None) -> Tensor:
        """The sum of what enters a state, which is not needed for it any more, and was before."""
        entering = self._entering.pop(state, ())
        x = _like(before) if before is not None else _result(*entering[0][:2])
        self.call("mix", x, state, before, x)
        return x

    def call(self, function: str, x: Tensor, state: int, *arguments) -> None:
        """Call a kernel with the terms of one state x."""
        sizes = len(self.array), state, x.shape[1], _pixels(x)
        kernels.call(function, x.dtype, self.array, *sizes, *arguments)


class _Mixed(torch.autograd.Function):
    """`mix` of dense tensors."""

    @staticmethod
    def forward(ctx, plan, differentiable, *tensors):
        given, (scale, *rest) = tensors[: plan.given], tensors[plan.given :]
        before, tensors = rest[: plan.sums], rest[plan.sums :]
        states: list[Tensor | None] = [*given, *before]
        terms = _Terms(plan, scale)
        batches, kept, ctx.kept = [], [], {}
        for state, leaving in enumerate(plan.leaving):
            if state >= plan.given and plan.touched[state - plan.given]:
                states[state] = terms.mix(state, states[state])
            for part in leaving:
                y, moments, own = part.forward([states[i] for i in part.sources], tensors)
                terms.set(part, y, moments, tensors)
                batches += part.batches(y, moments, own)
                if differentiable:
                    ctx.kept[part] = slice(len(kept), len(kept) + 2 + len(own))
                    kept += y, moments, *own
        _record(batches)
        ctx.plan, ctx.inputs = plan, len(tensors)
        ctx.save_for_backward(scale, *states, *tensors, *kept)
        ctx.set_materialize_grads(False)
        return tuple(states[plan.given :])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        plan = ctx.plan
        scale, *saved = ctx.saved_tensors
        count = plan.given + plan.sums
        states, saved = saved[:count], saved[count:]
        tensors, saved = saved[: ctx.inputs], saved[ctx.inputs :]
        _, _, *needs = ctx.needs_input_grad
        needs_scale = needs.pop(plan.given)
        of_states, needs = needs[:count], needs[count:]
        terms = _Terms(plan, scale)
        for part, where in ctx.kept.items():
            y, moments, *_ = saved[where]
            terms.set(part, y, moments, tensors)
        to = _Backward(plan, states, tensors, of_states, needs, needs_scale)
        to.start(gradients)
        factors = states[0].new_zeros(3, terms.channels)
        of_weight, of_bias = states[0].new_zeros(2, terms.channels)
        of_scale = states[0].new_zeros(plan.size)
        for state in reversed(range(count)):
            for part in plan.leaving[state]:
                y, _, *own = saved[ctx.kept[part]]
                where = terms.places[part]
                if all(to.gradients[target] is None for target in part.targets):
                    continue
                beyond = [to.of_state(target, whole=False)[0] for target in part.targets]
                if any(gradient is None for gradient in beyond):
                    continue
                if part.norms is not None and part.norms.affine is not None:
                    to.found[part.norms.affine] = of_weight[where], of_bias[where]
                given = _Given(beyond, part.channels(y), y, factors[:, where])
                part.backward(given, own, to)
            own = to.gradients[state]
            if own is not None and state >= plan.given:
                found = factors, terms.channels, of_weight, of_bias, of_scale
                terms.call("mix_backward", own, state, own, *found)
        found = [own if need else None for own, need in zip(to.gradients, of_states, strict=True)]
        of_scale = of_scale[plan.weighted] if needs_scale else None
        return None, None, *found[: plan.given], of_scale, *found[plan.given :], *to.found
