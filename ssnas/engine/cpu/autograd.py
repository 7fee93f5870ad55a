"""Graphs of mixed operations by the compiled kernels: `engine.graph` defines what they compute.

One autograd function computes all states of a graph, as a rule those of all cells. It writes to
memory only the states, and the outputs of convolutions and poolings before their batch norms:

- a separable convolution passes over a band of image rows at a time, whose depthwise output never
  leaves the cache and is computed again in backward;
- batch norm and ReLU are applied while the next operation reads, and so is the gradient of a batch
  norm, since by channel both are affine;
- all operations that enter a state are normalised, weighted and added up in one pass, and all
  gradients for a state are added up where they arise.

The forward and the backward pass are tapes (`cpu.tape`), recorded when they are first needed: a
step collects its tensors and runs them.

The gradients have no gradients of their own; PyTorch says so when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssnas.engine.batch_norm import check_scale
from ssnas.engine.cpu.lowering import GroupOutput, LazyGradient, LoweredGroup, lower, of_affine
from ssnas.engine.cpu.passes import BackwardPass, ForwardPass, LearnedTensors
from ssnas.engine.cpu.tape import Region
from ssnas.engine.op_group import OpGroup

KEPT_PASSES = 16
"""Passes to keep, those used last: the forward passes of a plan, for as many sizes of images and
modes, and the backward passes of each, for as many sets of needed gradients."""

Pass = TypeVar("Pass", bound=ForwardPass | BackwardPass)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a tensor (N, C, H, W) in the channels-last layout."""
    return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _values(count: int, dtype: torch.dtype) -> Tensor:
    return empty((count, 1, 1, 1), dtype).flatten()


class Plan:
    """The computation of a graph, for tensors of any size.

    Args: see `engine.graph.Graph`.

    Attributes:
        groups: the groups of operations as kernel calls.
        learned: the tensors besides the states that gradients flow to.
        norms: all batch norms.
        leaving: for each state the groups to compute when it, the last one that they read, is
            there.
        entering: for each state the groups that enter it, each with the position among its targets.
        weighted: how many targets have a weight.
        weights: for each weighted group the positions of its targets' weights.
        read: for each state whether a group reads it.
        touched: for each sum whether it is entered or read; any other stays as it is.
    """

    def __init__(self, groups: Sequence[OpGroup], inputs: int, sums: int) -> None:
        self.inputs, self.sums, self.learned = inputs, sums, LearnedTensors()
        self.groups = [lower(group, self.learned) for group in groups]
        modules = (module for group in groups for op in group.ops for module in op.modules())
        self.norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        self.weights: dict[LoweredGroup, range] = {}
        self.weighted = 0
        for group in self.groups:
            if group.group.weighted:
                first, self.weighted = self.weighted, self.weighted + len(group.targets)
                self.weights[group] = range(first, self.weighted)
        # One that writes the whole gradient for what it reads goes first.
        ordered = sorted(self.groups, key=lambda group: not group.whole)
        states = range(inputs + sums)
        self.leaving = [
            [group for group in ordered if max(group.sources) == state] for state in states
        ]
        self.entering = [
            [
                (group, i)
                for group in self.groups
                for i, target in enumerate(group.targets)
                if target == state
            ]
            for state in states
        ]
        self.read = [any(state in group.sources for group in self.groups) for state in states]
        self.touched = [bool(self.entering[state]) or self.read[state] for state in states[inputs:]]
        self._passes: dict[tuple[Any, ...], Forward] = {}

    def statistics(self, dtype: torch.dtype) -> list[Tensor]:
        """Running mean, running variance and number of batches of all norms, one after the other.

        Raises:
            TypeError: for statistics that the kernels cannot read and write.
        """
        types = dtype, dtype, torch.int64
        statistics: list[Tensor] = []
        for norm in self.norms:
            buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
            for tensor, kind in zip(buffers, types, strict=True):
                dense = tensor is not None and tensor.is_cpu and tensor.is_contiguous()
                if tensor is None or not dense or tensor.dtype != kind:
                    raise TypeError(
                        "running statistics must be dense, on the CPU, and of the images' type; "
                        "the number of batches, of int64"
                    )
                statistics.append(tensor)
        return statistics

    def forward(self, tensors: Sequence[Tensor | None], keeps: bool) -> Forward:
        """The forward pass for such tensors, in the norms' modes."""
        modes = [
            (norm.training, norm.track_running_stats, norm.momentum, norm.eps)
            for norm in self.norms
        ]
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
        assert tensors[0] is not None
        dtype = tensors[0].dtype
        key = (dtype, keeps, *shapes, *modes)
        return _kept(self._passes, key, lambda: Forward(self, dtype, shapes, keeps))


def _kept(
    passes: dict[tuple[Any, ...], Pass], key: tuple[Any, ...], record: Callable[[], Pass]
) -> Pass:
    """The pass that is kept for this key, or else a new one."""
    kept = passes.pop(key, None) or record()
    if len(passes) == KEPT_PASSES:
        del passes[next(iter(passes))]
    passes[key] = kept
    return kept


class Forward(ForwardPass):
    """The tape that computes the sums of a plan.

    A run takes its scratch memory, the inputs, the weights, what is added to the sums, the learned
    tensors, the norms' statistics, and the sums.

    Attributes:
        outputs: the output of each group.
        computed: the regions of the sums to be computed.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        shapes: Sequence[tuple[int, ...] | None],
        keeps: bool,
    ) -> None:
        super().__init__(dtype, shapes, (plan.inputs, plan.sums), plan.norms, keeps)
        self.plan = plan
        self.outputs: dict[LoweredGroup, GroupOutput] = {}
        self.computed: list[Region] = []
        for state, leaving in enumerate(plan.leaving):
            if state >= plan.inputs and plan.touched[state - plan.inputs]:
                self._sum(state)
            for group in leaving:
                self.outputs[group] = group.forward(self)
        self._passes: dict[tuple[Any, ...], Backward] = {}

    def _sum(self, state: int) -> None:
        entering, before = self.plan.entering[state], self.states[state]
        first = before
        if first is None:
            first = self.outputs[entering[0][0]].channels_of(0)
        x = self.tape.tensor(first.shape)
        terms = [self.term(group, i) for group, i in entering]
        self.tape.call("weighted_sum", terms, len(terms), x.channels, x.pixels, before, x)
        self.states[state] = x
        self.computed.append(x)
        done = {group for group, _ in entering if max(group.targets) == state}
        self.drop(*{self.outputs[group].y for group in done})

    def term(self, group: LoweredGroup, i: int) -> tuple[Any, ...]:
        """The fields of `Term` in kernels.cpp: what a group brings to its i-th target."""
        output, scale = self.outputs[group], None
        if self.scale is not None and group.group.weighted:
            scale = self.scale.part(self.plan.weights[group][i], 1)
        channels = output.channels
        norm = output.norm.restrict(channels, output.first(i), i * channels, scale)
        return output.channels_of(i), norm, output.y.channels

    def backward(self, needs: Sequence[bool], reached: Sequence[bool]) -> Backward:
        """The backward pass for the gradients that are needed; arguments as of `Backward`."""
        key = (*needs, *reached)
        return _kept(self._passes, key, lambda: Backward(self, needs, reached))


class Backward(BackwardPass):
    """The tape that computes the gradients of a forward pass.

    A run takes the tensors of the forward pass's run, its own scratch memory, one tensor for all
    gradients for weights and learned tensors, the gradients for the sums, and the gradients for
    states that are asked for.

    Args:
        forward: the forward pass.
        needs: for each of the tensors before the statistics whether its gradient is needed.
        reached: for each computed sum whether there is a gradient for it.
    """

    def __init__(self, forward: Forward, needs: Sequence[bool], reached: Sequence[bool]) -> None:
        plan = self.plan = forward.plan
        of_inputs, (of_scale, *rest) = needs[: plan.inputs], needs[plan.inputs :]
        super().__init__(forward, [*of_inputs, *rest[: plan.sums]], rest[plan.sums :])
        self.forward = forward
        self._extend_wanted(of_scale)
        self._of_scale = self.joint((plan.weighted,)) if of_scale else None
        if of_scale:
            self.tape.call("clear", self._of_scale, plan.weighted)
        self._factors = self._cleared_factors()
        self._entered: set[int] = set()
        self._start(reached)
        for state in reversed(range(len(self.states))):
            for group in plan.leaving[state]:
                self._leave(group)
            if state >= plan.inputs and self.gradients[state] is not None:
                self._enter(state)
            self._free_after(state)
        of_states = [
            region if asked else None
            for region, asked in zip(self.gradients, self._asked_states, strict=True)
        ]
        of_tensors = [self._of_tensors.get(i) for i in range(len(self.tensors))]
        results = [*of_states[: plan.inputs], self._of_scale, *of_states[plan.inputs :]]
        self._results = [
            None if region is None else self._index(region) for region in [*results, *of_tensors]
        ]

    def _extend_wanted(self, of_scale: bool) -> None:
        """Want the gradient of each state that leads back to one that is needed."""
        for state, entering in enumerate(self.plan.entering):
            self.wanted[state] |= any(
                any(self.wanted[source] for source in group.sources)
                or group.learns(self)
                or (of_scale and group.group.weighted)
                for group, _ in entering
            )

    def _cleared_factors(self) -> dict[LoweredGroup, Region]:
        """Factor, slope and offset (see `LazyGradient`) of all groups' outputs, zeros at first."""
        outputs = self.forward.outputs.items()
        shapes = [(3 * len(group.targets) * output.channels,) for group, output in outputs]
        factors = self.tape.empty(sum(count for (count,) in shapes))
        self.tape.call("clear", factors, factors.count)
        return dict(zip(self.forward.outputs, factors.parts(shapes), strict=True))

    def _index(self, region: Region) -> int:
        """The position of a result among the tensors of a run, followed by the joint regions."""
        if region.tensor != self._joint.tensor:
            return region.tensor - 1
        return self.tape.tensors + self.regions.index(region)

    def _start(self, reached: Sequence[bool]) -> None:
        """Take over the gradients for the sums; others may read those tensors too."""
        sums = [s for s, touched in enumerate(self.plan.touched, self.plan.inputs) if touched]
        known = [state for state, has_gradient in zip(sums, reached, strict=True) if has_gradient]
        regions = [self.tape.tensor(self.state(state).shape) for state in known]
        for state, region in zip(known, regions, strict=True):
            if not self.wanted[state]:
                continue
            self.gradients[state] = region
            if self.plan.read[state]:
                copy = self.gradients[state] = self.new_of_state(state)
                self.tape.call("weighted_sum", (), 0, copy.channels, copy.pixels, region, copy)

    def _enter(self, state: int) -> None:
        """Compute what the norms of the groups that enter a state need of its gradient."""
        self._entered.add(state)
        gradient, entering = self.gradients[state], self.plan.entering[state]
        assert gradient is not None
        terms = [self.forward.term(group, i) for group, i in entering]
        moments = [self._moments(group, i) for group, i in entering]
        sizes = len(terms), gradient.channels, gradient.pixels
        self.tape.call("weighted_sum_backward", terms, moments, *sizes, gradient)

    def _moments(self, group: LoweredGroup, i: int) -> tuple[Region | None, ...]:
        """The fields of `NormGradient` in kernels.cpp, for a group's i-th target."""
        output, factors = self.forward.outputs[group], self._factors[group]
        channels, distance = output.channels, factors.count // 3
        first, slope = i * channels, distance + output.first(i)
        of_scale = None
        if self._of_scale is not None and group.group.weighted:
            of_scale = self._of_scale.part(self.plan.weights[group][i], 1)
        affine = [r and r.part(first, channels) for r in of_affine(self, group.norms)]
        starts = first, slope, slope + distance
        return *(factors.part(start, channels) for start in starts), *affine, of_scale

    def _leave(self, group: LoweredGroup) -> None:
        """Take the gradients for a group's targets to what it comes from."""
        output = self.forward.outputs[group]
        channels = output.channels
        unreached = [i for i, target in enumerate(group.targets) if target not in self._entered]
        if len(unreached) == len(group.targets):
            return
        beyond = []
        for target in group.targets:
            gradient, _ = self.of_state(target, whole=False)
            if gradient is None:
                return
            beyond.append(gradient)
        for region in of_affine(self, group.norms):
            if region is not None:
                for i in unreached:
                    self.tape.call("clear", region.part(i * channels, channels), channels)
        group.backward(LazyGradient(beyond, channels, output.y, self._factors[group]), output, self)

    def _free_after(self, state: int) -> None:
        """Free the gradients that no group reads any more."""
        for target, entering in enumerate(self.plan.entering):
            last_read = min((max(group.sources) for group, _ in entering), default=target)
            gradient = self.gradients[target]
            if last_read == state and gradient is not None:
                self.tape.free(gradient)

    def run(
        self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients for all tensors before the statistics, None for those not needed.

        Args:
            tensors: those of the forward pass.
            gradients: the gradients for the sums that have one.
        """
        dtype = self.tape.dtype
        counts = [region.count for region in self.regions]
        memory, joint = _values(self.tape.size, dtype), _values(sum(counts), dtype)
        returned = [empty(region.shape, dtype) for region in self.returned]
        run = [*tensors, memory, joint, *gradients, *returned]
        for region in self.states:
            if region is not None:
                # Hooks on saved tensors may have brought them to another layout.
                state = run[region.tensor - 1]
                assert state is not None
                run[region.tensor - 1] = _dense(state)
        self.tape.run(*run)
        parts = zip(joint.split(counts), self.regions, strict=True)
        run += (part.view(region.shape) for part, region in parts)
        return [None if i is None else run[i] for i in self._results]


def compute(
    plan: Plan,
    inputs: Sequence[Tensor],
    scale: Tensor | None,
    before: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """x_j = before_j + Σ_i (weight_i · x̂_i + bias_i), over the operations i that enter x_j.

    Args:
        inputs: the first states, (N, C, H, W).
        scale: the weights of the weighted targets, one after the other; or None, where they are
            parameters of norms, or 1.
        before: what is added to each other state, or None for zeros.

    Raises:
        ValueError: for affine norms with a scale, or a scale of another length.
        TypeError: for tensors of several types.
    """
    if scale is not None and len(scale) != plan.weighted:
        raise ValueError(f"{plan.weighted} edges need as many weights; found {len(scale)}")
    for group in plan.groups:
        if group.norms is not None and group.group.weighted:
            check_scale(group.norms.norms, scale)
    tensors = [
        *map(_dense, inputs),
        None if scale is None else scale.contiguous(),
        *(
            None if summand is None or not touched else _dense(summand)
            for summand, touched in zip(before, plan.touched, strict=True)
        ),
        *plan.learned.tensors(),
    ]
    types = {(t.dtype, t.is_cpu) for t in tensors if t is not None}
    if len(types) > 1:
        names = sorted(f"{dtype}{'' if is_cpu else ' elsewhere'}" for dtype, is_cpu in types)
        raise TypeError(f"mixed operations need tensors of one type on the CPU; found {names}")
    statistics = plan.statistics(inputs[0].dtype)
    forward = plan.forward(tensors, torch.is_grad_enabled())
    sums = iter(_Mixed.apply(forward, statistics, *tensors))
    return [
        next(sums) if touched else summand
        for touched, summand in zip(plan.touched, before, strict=True)
    ]


class _Mixed(torch.autograd.Function):
    """`compute` of dense tensors."""

    @staticmethod
    def forward(
        ctx: Any, forward: Forward, statistics: Sequence[Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        plan, dtype = forward.plan, forward.tape.dtype
        memory = _values(forward.tape.size, dtype)
        sums = tuple(empty(region.shape, dtype) for region in forward.computed)
        forward.tape.run(memory, *tensors, *statistics, *sums)
        ctx.forward_pass = forward
        if forward.keeps:
            # A backward pass reads neither what is added to sums nor statistics.
            first, last = plan.inputs + 1, plan.inputs + 1 + plan.sums
            kept = *tensors[:first], *[None] * plan.sums, *tensors[last:]
            ctx.save_for_backward(memory, *kept, *[None] * len(statistics), *sums)
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, *needs = ctx.needs_input_grad
        reached = [gradient is not None for gradient in gradients]
        known = [_dense(gradient) for gradient in gradients if gradient is not None]
        backward = ctx.forward_pass.backward(needs, reached)
        return None, None, *backward.run(ctx.saved_tensors, known)
