"""Terms as calls of kernels: how they come from states, and how gradients return there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ssnas.engine.batch_norm import affine_of
from ssnas.engine.cpu.tape import Argument, Place
from ssnas.engine.op_group import Term
from ssnas.networks.operations import DepthwiseSeparable

if TYPE_CHECKING:
    from ssnas.engine.cpu.autograd import Backward, Forward


class Shape(NamedTuple):
    """Sizes of convolutions or a pooling, as `Shape` of kernels.cpp."""

    n: int
    image_height: int
    image_width: int
    height: int
    width: int
    step: int
    channels: int
    operations: int
    shared: bool
    kernel: int
    stride: int
    dilation: int


def _shape(
    x: Place, operations: int, shared: bool, kernel: int, stride: int, dilation: int
) -> Shape:
    """With stride and dilation 2 all taps meet the even pixels, as the taps of a plain kernel that
    reads those alone."""
    n, read, height, width = x.shape
    step = 2 if stride == dilation == 2 else 1
    return Shape(
        *(n, height, width, (height - 1) // step + 1, (width - 1) // step + 1, step),
        *(read if shared else read // operations, operations, shared, kernel),
        *(stride // step, dilation // step),
    )


def _result(x: Place, channels: int, stride: int = 1) -> tuple[int, int, int, int]:
    n, _, height, width = x.shape
    return n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1


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


class Applied(NamedTuple):
    """A batch norm that is applied to what is read, as `Norm` of kernels.cpp."""

    mean: Place | None = None
    var: Place | None = None
    eps: float = 0.0
    weight: Place | None = None
    bias: Place | None = None
    scale: Place | None = None
    fixed: bool = True

    def of(self, channels: int, first: int, own: int, scale: Place | None) -> Applied:
        """That of so many channels, from the first one on, with affine parameters from `own` on;
        and with what multiplies its result."""
        mean, var = (place and place.part(first, channels) for place in (self.mean, self.var))
        weight, bias = (place and place.part(own, channels) for place in (self.weight, self.bias))
        return self._replace(mean=mean, var=var, weight=weight, bias=bias, scale=scale)


NO_NORM = Applied()


class Norms:
    """Batch norms of a result, side by side, applied by whatever reads it."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d], inputs: Inputs) -> None:
        self.norms, self.first = norms, norms[0]
        self.affine = inputs.add(2, partial(affine_of, norms)) if self.first.affine else None

    def moments(self, to: Forward, y: Place) -> tuple[Place, Place | None]:
        """Mean and variance of y, one after the other, and what a kernel must write them into.

        Where several norms have the same y, as behind a pooling, their statistics are the same.

        Raises:
            ValueError: for a single value a channel, which has no variance.
        """
        moments = to.program.empty(2 * y.channels)
        if self.first.training:
            if y.pixels == 1:
                raise ValueError(f"batch norm needs more than one value a channel; found {y.shape}")
            return moments, moments
        channels = self.first.num_features
        own = [to.statistics[norm] for norm in self.norms[: y.channels // channels]]
        places = [mean for mean, _, _ in own] + [var for _, var, _ in own]
        to.program.call("join", places, len(places), channels, moments)
        return moments, None

    def record(self, to: Forward, moments: Place, pixels: int) -> None:
        """Let norms that track statistics record the mean and variance of so many pixels."""
        if not self.first.training or not self.first.track_running_stats:
            return
        channels, width = self.first.num_features, moments.count // 2
        records = []
        for i, norm in enumerate(self.norms):
            mean, var, batches = to.statistics[norm]
            own = i * channels % width
            found = moments.part(own, channels), moments.part(width + own, channels)
            records.append(
                (float(self.first.momentum), mean, var, batches, *found, channels, pixels)
            )
        to.program.call("record", records, len(records))

    def applied(self, to: Forward, moments: Place) -> Applied:
        """To a result with this mean and variance."""
        width = moments.count // 2
        affine = (None, None) if self.affine is None else to.tensors[self.affine]
        mean, var = moments.parts([(width,), (width,)])
        return Applied(mean, var, float(self.first.eps), *affine, fixed=not self.first.training)


@dataclass(frozen=True)
class Result:
    """What a part gives.

    Args:
        y: C channels where all of its targets have the same, or else C for each.
        channels: C.
        norm: what is applied to it, with norms.
        read: by the layers of convolutions but the first, and the norms that are applied to it.
    """

    y: Place
    channels: int
    norm: Applied = NO_NORM
    read: Sequence[tuple[Place, Applied]] = ()

    def first(self, i: int) -> int:
        """The first channel for the i-th target."""
        return 0 if self.y.channels == self.channels else i * self.channels

    def of(self, i: int) -> Place:
        """The channels for the i-th target."""
        n, _, *size = self.y.shape
        return Place(self.y.tensor, self.y.start + self.first(i), (n, self.channels, *size))


@dataclass(frozen=True)
class Given:
    """A gradient for y that is computed when it is read: factor · beyond + slope · y + offset.

    Args:
        beyond: the gradient behind y's norms, of each edge.
        stride: values from one pixel of those to the next.
        factors: factor, slope and offset of each channel, one after the other.
    """

    beyond: Sequence[Place]
    stride: int
    y: Place
    factors: Place

    def arguments(self, to: Backward) -> tuple[Argument, ...]:
        """As `Gradient` of kernels.cpp."""
        distance = self.factors.count // 3
        own = to.program.place(self.beyond), self.stride, self.y, self.factors
        return *own, distance, self.y.channels

    def write(self, to: Backward, of_y: Place, adds: bool) -> None:
        """Compute it, or add it to what there is."""
        sizes = self.y.pixels, len(self.beyond), self.beyond[0].channels
        to.program.call("norm_backward", *sizes, self.arguments(to), adds, of_y)


class Part:
    """A term: how it comes from the states that it reads, and how its gradient returns there.

    Args:
        inputs: takes its tensors.

    Attributes:
        norms: at its end, or None.
    """

    whole = True
    """Whether `backward` can write all of the gradient for what it reads, instead of adding."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        self.term, self.targets, self.sources = term, term.targets, term.sources
        self.norms = None if term.norms is None else Norms(term.norms, inputs)

    def forward(self, to: Forward) -> Result:
        """Call what computes it."""
        raise NotImplementedError

    def normalised(
        self, to: Forward, y: Place, moments: Place, *read: tuple[Place, Applied]
    ) -> Result:
        """The result, whose moments are recorded."""
        self.norms.record(to, moments, y.pixels)
        return Result(y, self.norms.first.num_features, self.norms.applied(to, moments), read)

    def learns(self, to: Backward) -> bool:
        """Whether a gradient for one of its tensors is needed."""
        return self.norms is not None and to.needs(self.norms.affine)

    def backward(self, given: Given, result: Result, to: Backward) -> None:
        """Call what takes the gradient for the result to the states and the tensors."""
        raise NotImplementedError


class State(Part):
    """The state itself."""

    def forward(self, to):
        x = to.states[self.sources[0]]
        return Result(x, x.channels)

    def backward(self, given, result, to):
        of_state, adds = to.of_state(*self.sources)
        if of_state is not None:
            given.write(to, of_state, adds)


class Normalised(State):
    """The state itself, with a batch norm."""

    def forward(self, to):
        y = to.states[self.sources[0]]
        moments, written = self.norms.moments(to, y)
        if written is not None:
            to.program.call("find_moments", y.pixels, y.channels, y, written)
        return self.normalised(to, y, moments)


class Zeros(Part):
    """What enters a state that no other term enters."""

    def forward(self, to):
        x = to.states[self.sources[0]]
        y = to.program.empty(*_result(x, x.channels, self.term.ops[0].stride))
        to.program.call("clear", y, y.count)
        return Result(y, y.channels)

    def backward(self, given, result, to):
        pass


class Pooled(Part):
    """A 3×3 pooling, the same for all targets."""

    whole = False

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        pool = term.ops[0].pool
        self.stride, self.largest = pool.stride, isinstance(pool, nn.MaxPool2d)

    def forward(self, to):
        x = to.states[self.sources[0]]
        y = to.program.empty(*_result(x, x.channels, self.stride))
        moments, written = self.norms.moments(to, y)
        to.program.call("pool", self._shape(x), self.largest, x, y, written)
        return self.normalised(to, y, moments)

    def backward(self, given, result, to):
        of_state, _ = to.of_state(*self.sources, self.whole)
        if of_state is not None:
            x, of_y = to.states[self.sources[0]], to.program.empty(*result.y.shape)
            given.write(to, of_y, adds=False)
            tensors = x, result.y, of_y, of_state
            to.program.call("pool_backward", self._shape(x), self.largest, *tensors)
            to.program.free(of_y)

    def _shape(self, x: Place) -> Shape:
        return _shape(x, 1, True, 3, self.stride, 1)


class Convolved(Part):
    """Separable convolutions, one layer after another, each with batch norms."""

    def __init__(self, term: Term, inputs: Inputs) -> None:
        super().__init__(term, inputs)
        *others, last = term.layers
        self.layers = [
            *(_Layer(ops, Norms([op.norm for op in ops], inputs), inputs) for ops in others),
            _Layer(last, self.norms, inputs),
        ]

    def forward(self, to):
        y, moments = self.layers[0].forward(to, to.states[self.sources[0]], NO_NORM)
        read = []
        for before, layer in pairwise(self.layers):
            before.norms.record(to, moments, y.pixels)
            x, norm = y, before.norms.applied(to, moments)
            y, moments = layer.forward(to, x, norm)
            to.drop(x)
            read.append((x, norm))
        return self.normalised(to, y, moments, *read)

    def learns(self, to):
        return any(layer.learns(to) for layer in self.layers)

    def backward(self, given, result, to):
        (source,) = self.sources
        if not to.wanted[source] and not self.learns(to):
            return
        read, written = list(result.read), []
        for before, layer in reversed(list(pairwise(self.layers))):
            x, norm = read.pop()
            written.append(to.program.empty(*x.shape))
            given = layer.backward(to, given, x, (written[-1], False), before.norms, norm)
        of_state = to.of_state(source, self.whole)
        self.layers[0].backward(to, given, to.states[source], of_state)
        to.program.free(*written)

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

    def forward(self, to):
        (kernel,), x = to.tensors[self.kernel], [to.states[source] for source in self.sources]
        y = to.program.empty(*_result(x[0], kernel.shape[0], self.stride))
        moments, written = self.norms.moments(to, y)
        to.program.call("project", self._sizes(x, y), x, kernel, y, written)
        return self.normalised(to, y, moments)

    def _sizes(self, x: Sequence[Place], y: Place) -> tuple:
        """As `Projection` of kernels.cpp."""
        return _shape(x[0], len(self.targets), True, 1, self.stride, 1), len(x), y.channels

    def learns(self, to):
        return to.needs(self.kernel) or super().learns(to)

    def backward(self, given, result, to):
        if not to.needs(self.kernel) and not any(to.wanted[source] for source in self.sources):
            return
        (kernel,), x = to.tensors[self.kernel], [to.states[source] for source in self.sources]
        of_x, adds = zip(*map(to.of_state, self.sources), strict=True)
        (of_kernel,) = to.of_tensors(self.kernel) if to.needs(self.kernel) else (None,)
        arguments = self._sizes(x, result.y), x, kernel, given.arguments(to), of_x, adds, of_kernel
        to.program.call("project_backward", *arguments)


class _Layer:
    """Separable convolutions of several edges side by side, with the batch norms behind them."""

    def __init__(self, ops: Sequence[DepthwiseSeparable], norms: Norms, inputs: Inputs) -> None:
        kinds = [op.depthwise for op in ops], [op.pointwise for op in ops]
        self.kernels = [
            # Autograd follows these copies; made within its function, it would not.
            inputs.add(len(own), lambda own=own: [layer.weight.contiguous() for layer in own])
            for own in kinds
        ]
        self.norms = norms
        self.edges, self.first = len(ops), ops[0]

    def _shape(self, x: Place) -> Shape:
        shared = x.channels == self.first.depthwise.in_channels
        kernel = self.first.depthwise.kernel_size[0]
        return _shape(x, self.edges, shared, kernel, self.first.stride, self.first.dilation)

    def forward(self, to: Forward, x: Place, before: Applied) -> tuple[Place, Place]:
        """The result and its moments; `before` is applied to x."""
        shape = self._shape(x)
        channels = shape.operations * shape.channels
        y = to.program.empty(*_result(x, channels, self.first.stride))
        moments, written = self.norms.moments(to, y)
        kernels = [to.tensors[where] for where in self.kernels]
        to.program.call("convolve", shape, x, before, *kernels, y, written)
        return y, moments

    def learns(self, to: Backward) -> bool:
        return to.needs(*self.kernels, self.norms.affine)

    def backward(
        self,
        to: Backward,
        given: Given,
        x: Place,
        of_x: tuple[Place | None, bool],
        norms: Norms | None = None,
        before: Applied = NO_NORM,
    ) -> Given | None:
        """Gradients for the kernels and for x.

        Args:
            x: what was read.
            of_x: where its gradient belongs, behind norms that for their result, and whether to
                add it.
            norms, before: of x.

        Returns:
            the gradient for x, if there are norms.
        """
        kernels = [to.tensors[where] for where in self.kernels]
        of_kernels = [None, None]
        if to.needs(*self.kernels):
            of_kernels = [to.of_tensors(where) for where in self.kernels]
        found, behind = None, None
        if norms is not None:
            width = x.channels
            factors = to.program.empty(3 * width)
            to.program.call("clear", factors, factors.count)
            found = *factors.parts([(width,)] * 3), *to.of_affine(norms), None
            behind = Given(of_x[0].blocks(self.edges), width, x, factors)
        to.program.call(
            "convolve_backward",
            *(self._shape(x), x, before, *kernels, given.arguments(to)),
            *(*of_x, found, *of_kernels),
        )
        return behind
