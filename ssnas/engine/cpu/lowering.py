"""Groups of operations as calls of kernels: outputs from states, and gradients back to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar, cast

from torch import Tensor, nn

from ssnas.engine.batch_norm import affine_of, momentum_of
from ssnas.engine.cpu.passes import BackwardPass, ForwardPass, LearnedTensors
from ssnas.engine.cpu.tape import Argument, Arguments, Region
from ssnas.engine.op_group import (
    Description,
    Normalise,
    OpGroup,
    Pool,
    Project,
    Separable,
    SeparableLayer,
    Skip,
    Zero,
)
from ssnas.engine.torch_backend import joint_kernel

D = TypeVar("D", bound=Description)


class Shape(NamedTuple):
    """The sizes of convolutions or of a pooling, as `Shape` of kernels.cpp."""

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
    x: Region, operations: int, shared: bool, kernel: int, stride: int, dilation: int
) -> Shape:
    """The sizes of operations on x.

    With stride and dilation 2 all taps meet the even pixels, as the taps of a plain kernel that
    reads those alone.
    """
    n, read, height, width = x.shape
    step = 2 if stride == dilation == 2 else 1
    return Shape(
        *(n, height, width, (height - 1) // step + 1, (width - 1) // step + 1, step),
        *(read if shared else read // operations, operations, shared, kernel),
        *(stride // step, dilation // step),
    )


def _output(x: Region, channels: int, stride: int = 1) -> tuple[int, int, int, int]:
    n, _, height, width = x.shape
    return n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1


class AppliedNorm(NamedTuple):
    """A batch norm that a kernel applies to what it reads, as `Norm` of kernels.cpp."""

    mean: Region | None = None
    var: Region | None = None
    eps: float = 0.0
    weight: Region | None = None
    bias: Region | None = None
    scale: Region | None = None
    fixed: bool = True

    def restrict(
        self, channels: int, first: int, first_affine: int, scale: Region | None
    ) -> AppliedNorm:
        """Restrict this norm to `channels` channels starting at `first`, scaled by `scale`.

        Its affine parameters start at `first_affine`.
        """
        mean, var = (r and r.part(first, channels) for r in (self.mean, self.var))
        weight, bias = (r and r.part(first_affine, channels) for r in (self.weight, self.bias))
        return self._replace(mean=mean, var=var, weight=weight, bias=bias, scale=scale)


NO_NORM = AppliedNorm()


class NormGroup:
    """Batch norms of one output, side by side, applied by the kernels that read it."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d], learned: LearnedTensors) -> None:
        self.norms, self.first = norms, norms[0]
        self.affine = learned.add(2, self._affine_parameters) if self.first.affine else None

    def _affine_parameters(self) -> list[Tensor]:
        return [parameter for parameter in affine_of(self.norms) if parameter is not None]

    def moments(self, fwd: ForwardPass, y: Region) -> tuple[Region, Region | None]:
        """Mean and variance of y, one after the other.

        Several norms of the same y, as behind a pooling, have the same statistics.

        Returns:
            their region, and once more if a kernel has to write them.

        Raises:
            ValueError: for a single value a channel, which has no variance.
        """
        moments = fwd.tape.empty(2 * y.channels)
        if self.first.training:
            if y.pixels == 1:
                raise ValueError(f"batch norm needs more than one value a channel; found {y.shape}")
            return moments, moments
        channels = self.first.num_features
        statistics = [fwd.statistics[norm] for norm in self.norms[: y.channels // channels]]
        regions = [mean for mean, _, _ in statistics] + [var for _, var, _ in statistics]
        fwd.tape.call("join", regions, len(regions), channels, moments)
        return moments, None

    def record(self, fwd: ForwardPass, moments: Region, pixels: int) -> None:
        """Let norms that track statistics record the mean and variance of `pixels` pixels."""
        if not self.first.training or not self.first.track_running_stats:
            return
        channels, width = self.first.num_features, moments.count // 2
        records = []
        for i, norm in enumerate(self.norms):
            start = i * channels % width
            batch = moments.part(start, channels), moments.part(width + start, channels)
            records.append(
                (momentum_of(self.first), *fwd.statistics[norm], *batch, channels, pixels)
            )
        fwd.tape.call("record", records, len(records))

    def applied(self, fwd: ForwardPass, moments: Region) -> AppliedNorm:
        """The norms as applied to an output of this mean and variance."""
        width = moments.count // 2
        weight, bias = (None, None) if self.affine is None else fwd.tensors[self.affine]
        mean, var = moments.parts([(width,), (width,)])
        fixed = not self.first.training
        return AppliedNorm(mean, var, float(self.first.eps), weight, bias, fixed=fixed)


@dataclass(frozen=True)
class GroupOutput:
    """The output of a group, before its batch norms.

    Args:
        y: C channels where all of its targets have the same, or else C for each.
        channels: C.
        norm: the batch norm to apply to it.
        read: what the layers of convolutions but the first have read, and the norms applied to it.
    """

    y: Region
    channels: int
    norm: AppliedNorm = NO_NORM
    read: Sequence[tuple[Region, AppliedNorm]] = ()

    def first(self, i: int) -> int:
        """The first channel for the i-th target."""
        return 0 if self.y.channels == self.channels else i * self.channels

    def channels_of(self, i: int) -> Region:
        """The channels for the i-th target."""
        n, _, *size = self.y.shape
        return Region(self.y.tensor, self.y.start + self.first(i), (n, self.channels, *size))


@dataclass(frozen=True)
class LazyGradient:
    """A gradient for y that is computed when it is read: factor · beyond + slope · y + offset.

    Args:
        beyond: the gradient behind y's norms, of each edge.
        stride: values from one pixel of those to the next.
        y: the output that the gradient is for.
        factors: factor, slope and offset of each channel, one after the other.
    """

    beyond: Sequence[Region]
    stride: int
    y: Region
    factors: Region

    def arguments(self, bwd: BackwardPass) -> tuple[Argument, ...]:
        """The fields of `Gradient` in kernels.cpp."""
        distance = self.factors.count // 3
        regions = bwd.tape.structure(self.beyond), self.stride, self.y, self.factors
        return *regions, distance, self.y.channels

    def write(self, bwd: BackwardPass, of_y: Region, adds: bool) -> None:
        """Compute it, or add it to what is there."""
        sizes = self.y.pixels, len(self.beyond), self.beyond[0].channels
        bwd.tape.call("norm_backward", *sizes, self.arguments(bwd), adds, of_y)


class LoweredGroup:
    """A group of operations as kernel calls, forward and backward.

    Args:
        group: operations that the engine knows.
        learned: takes the group's learned tensors.

    Attributes:
        norms: the batch norms at its end, or None.
    """

    whole = True
    """True where `backward` can write all of the gradient for what it reads, instead of adding."""

    def __init__(self, group: OpGroup, learned: LearnedTensors) -> None:
        self.group, self.targets, self.sources = group, group.targets, group.sources
        self.norms = NormGroup(group.norms, learned) if group.norms else None

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        """Call the kernels that compute it."""
        raise NotImplementedError

    def normalised(
        self, fwd: ForwardPass, y: Region, moments: Region, *read: tuple[Region, AppliedNorm]
    ) -> GroupOutput:
        """The output y, whose moments are recorded."""
        assert self.norms is not None
        self.norms.record(fwd, moments, y.pixels)
        return GroupOutput(y, self.norms.first.num_features, self.norms.applied(fwd, moments), read)

    def learns(self, bwd: BackwardPass) -> bool:
        """Tell whether a gradient for one of its learned tensors is needed."""
        return self.norms is not None and bwd.needs(self.norms.affine)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        """Call the kernels that take the output's gradient to the states and learned tensors."""
        raise NotImplementedError


class LoweredSkip(LoweredGroup):
    """The state itself."""

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        x = fwd.state(self.sources[0])
        return GroupOutput(x, x.channels)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        of_state, adds = bwd.of_state(self.sources[0])
        if of_state is not None:
            gradient.write(bwd, of_state, adds)


class LoweredNorm(LoweredSkip):
    """The state itself, with a batch norm."""

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        assert self.norms is not None
        y = fwd.state(self.sources[0])
        moments, written = self.norms.moments(fwd, y)
        if written is not None:
            fwd.tape.call("find_moments", y.pixels, y.channels, y, written)
        return self.normalised(fwd, y, moments)


class LoweredZero(LoweredGroup):
    """Zeros, for a state that no other group enters."""

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        x = fwd.state(self.sources[0])
        (zero, *_) = _descriptions(self.group, Zero)
        y = fwd.tape.empty(*_output(x, x.channels, zero.stride))
        fwd.tape.call("clear", y, y.count)
        return GroupOutput(y, y.channels)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        pass


class LoweredPool(LoweredGroup):
    """A 3×3 pooling, the same for all targets."""

    whole = False

    def __init__(self, group: OpGroup, learned: LearnedTensors) -> None:
        super().__init__(group, learned)
        pool = _descriptions(group, Pool)[0].pool
        self.stride, self.largest = cast(int, pool.stride), isinstance(pool, nn.MaxPool2d)

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        assert self.norms is not None
        x = fwd.state(self.sources[0])
        y = fwd.tape.empty(*_output(x, x.channels, self.stride))
        moments, written = self.norms.moments(fwd, y)
        fwd.tape.call("pool", self._shape(x), self.largest, x, y, written)
        return self.normalised(fwd, y, moments)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        of_state, _ = bwd.of_state(self.sources[0], self.whole)
        if of_state is not None:
            x, of_y = bwd.state(self.sources[0]), bwd.tape.empty(*output.y.shape)
            gradient.write(bwd, of_y, adds=False)
            tensors = x, output.y, of_y, of_state
            bwd.tape.call("pool_backward", self._shape(x), self.largest, *tensors)
            bwd.tape.free(of_y)

    def _shape(self, x: Region) -> Shape:
        return _shape(x, 1, True, 3, self.stride, 1)


class LoweredSeparable(LoweredGroup):
    """Separable convolutions, one layer after another, each with batch norms."""

    def __init__(self, group: OpGroup, learned: LearnedTensors) -> None:
        super().__init__(group, learned)
        assert self.norms is not None
        *others, last = group.layers
        self.layers = [
            *(
                _SideBySide(layers, NormGroup([layer.norm for layer in layers], learned), learned)
                for layers in others
            ),
            _SideBySide(last, self.norms, learned),
        ]
        first = group.layers[0][0]
        # With stride and dilation 2 all taps meet the even pixels alone.
        self.whole = not first.stride == first.dilation == 2

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        y, moments = self.layers[0].forward(fwd, fwd.state(self.sources[0]), NO_NORM)
        read = []
        for before, layer in pairwise(self.layers):
            before.norms.record(fwd, moments, y.pixels)
            x, norm = y, before.norms.applied(fwd, moments)
            y, moments = layer.forward(fwd, x, norm)
            fwd.drop(x)
            read.append((x, norm))
        return self.normalised(fwd, y, moments, *read)

    def learns(self, bwd: BackwardPass) -> bool:
        return any(layer.learns(bwd) for layer in self.layers)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        (source,) = self.sources
        if not bwd.wanted[source] and not self.learns(bwd):
            return
        read, written = list(output.read), []
        for before, layer in reversed(list(pairwise(self.layers))):
            x, norm = read.pop()
            written.append(bwd.tape.empty(*x.shape))
            gradient = layer.backward_to_layer(bwd, gradient, x, written[-1], before.norms, norm)
        of_state = bwd.of_state(source, self.whole)
        self.layers[0].backward(bwd, gradient, bwd.state(source), of_state)
        bwd.tape.free(*written)


class LoweredProject(LoweredGroup):
    """Pointwise convolutions of relu(x), with batch norms; x are the channels of all that is read.

    Their joint kernel is (E C', C, 1, 1); at stride 2 (E C', 2 C, 1, 1), for the even pixels of x
    and, beside them, those diagonally after, and each channel reads only one of both.
    """

    def __init__(self, group: OpGroup, learned: LearnedTensors) -> None:
        super().__init__(group, learned)
        ops = _descriptions(group, Project)
        self.kernel = learned.add(1, lambda: [joint_kernel(ops).contiguous()])
        self.stride = ops[0].stride

    def forward(self, fwd: ForwardPass) -> GroupOutput:
        assert self.norms is not None
        (kernel,), x = fwd.tensors[self.kernel], [fwd.state(source) for source in self.sources]
        y = fwd.tape.empty(*_output(x[0], kernel.shape[0], self.stride))
        moments, written = self.norms.moments(fwd, y)
        fwd.tape.call("project", self._sizes(x, y), x, kernel, y, written)
        return self.normalised(fwd, y, moments)

    def _sizes(self, x: Sequence[Region], y: Region) -> tuple[Shape, int, int]:
        """The fields of `Projection` in kernels.cpp."""
        return _shape(x[0], len(self.targets), True, 1, self.stride, 1), len(x), y.channels

    def learns(self, bwd: BackwardPass) -> bool:
        return bwd.needs(self.kernel) or super().learns(bwd)

    def backward(self, gradient: LazyGradient, output: GroupOutput, bwd: BackwardPass) -> None:
        if not bwd.needs(self.kernel) and not any(bwd.wanted[source] for source in self.sources):
            return
        (kernel,), x = bwd.tensors[self.kernel], [bwd.state(source) for source in self.sources]
        of_x, adds = zip(*map(bwd.of_state, self.sources), strict=True)
        (of_kernel,) = bwd.of_tensors(self.kernel) if bwd.needs(self.kernel) else (None,)
        sizes = self._sizes(x, output.y)
        arguments = sizes, x, kernel, gradient.arguments(bwd), of_x, adds, of_kernel
        bwd.tape.call("project_backward", *arguments)


class _SideBySide:
    """One layer of separable convolutions of several edges, with the batch norms behind them."""

    def __init__(
        self, layers: Sequence[SeparableLayer], norms: NormGroup, learned: LearnedTensors
    ) -> None:
        depthwise, pointwise = [op.depthwise for op in layers], [op.pointwise for op in layers]
        self.kernels = [
            # Autograd follows these copies; made within its function, it would not.
            learned.add(len(layers), lambda: [c.weight.contiguous() for c in depthwise]),
            learned.add(len(layers), lambda: [c.weight.contiguous() for c in pointwise]),
        ]
        self.norms = norms
        self.edges, self.first = len(layers), layers[0]

    def _shape(self, x: Region) -> Shape:
        first = self.first
        shared = x.channels == first.channels
        return _shape(x, self.edges, shared, first.kernel, first.stride, first.dilation)

    def forward(self, fwd: ForwardPass, x: Region, before: AppliedNorm) -> tuple[Region, Region]:
        """The output and its moments; the kernel applies `before` to x."""
        shape = self._shape(x)
        channels = shape.operations * shape.channels
        y = fwd.tape.empty(*_output(x, channels, self.first.stride))
        moments, written = self.norms.moments(fwd, y)
        kernels = [fwd.tensors[where] for where in self.kernels]
        fwd.tape.call("convolve", shape, x, before, *kernels, y, written)
        return y, moments

    def learns(self, bwd: BackwardPass) -> bool:
        return bwd.needs(*self.kernels, self.norms.affine)

    def backward(
        self,
        bwd: BackwardPass,
        gradient: LazyGradient,
        x: Region,
        of_x: tuple[Region | None, bool],
        before: AppliedNorm = NO_NORM,
        moments: tuple[Region | None, ...] | None = None,
    ) -> None:
        """Compute the gradients for the kernels and for x.

        Args:
            gradient: of the output.
            x: what was read, with the norm `before` applied.
            of_x: the region for the gradient for x, behind the norm that for its output, and
                whether to add it.
            moments: the regions of `NormGradient` in kernels.cpp, for what x's norms need of it.
        """
        kernels = [bwd.tensors[where] for where in self.kernels]
        of_kernels: list[list[Region] | None] = [None, None]
        if bwd.needs(*self.kernels):
            of_kernels = [bwd.of_tensors(where) for where in self.kernels]
        arguments: list[Argument | Arguments] = [self._shape(x), x, before, *kernels]
        arguments += [gradient.arguments(bwd), *of_x, moments, *of_kernels]
        bwd.tape.call("convolve_backward", *arguments)

    def backward_to_layer(
        self,
        bwd: BackwardPass,
        gradient: LazyGradient,
        x: Region,
        of_x: Region,
        norms: NormGroup,
        before: AppliedNorm,
    ) -> LazyGradient:
        """The same where x is the output of another layer, with these norms.

        Returns:
            the gradient for x.
        """
        width = x.channels
        factors = bwd.tape.empty(3 * width)
        bwd.tape.call("clear", factors, factors.count)
        moments = *factors.parts([(width,)] * 3), *of_affine(bwd, norms), None
        self.backward(bwd, gradient, x, (of_x, False), before, moments)
        return LazyGradient(of_x.blocks(self.edges), width, x, factors)


def of_affine(bwd: BackwardPass, norms: NormGroup | None) -> Sequence[Region | None]:
    """The regions for gradients of the norms' weights and biases, None if they are not needed."""
    if norms is None or norms.affine is None or not bwd.needs(norms.affine):
        return None, None
    return bwd.of_tensors(norms.affine)


_LOWERED: dict[type[Description], type[LoweredGroup]] = {
    Skip: LoweredSkip,
    Normalise: LoweredNorm,
    Zero: LoweredZero,
    Pool: LoweredPool,
    Project: LoweredProject,
    Separable: LoweredSeparable,
}


def lower(group: OpGroup, learned: LearnedTensors) -> LoweredGroup:
    """The group as kernel calls, by the kind of its operations."""
    assert group.described is not None
    return _LOWERED[type(group.described[0])](group, learned)


def _descriptions(group: OpGroup, kind: type[D]) -> list[D]:
    return [op for op in group.described or () if isinstance(op, kind)]
