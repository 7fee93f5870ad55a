"""Mixed operations by the compiled kernels: `mixed` says what they compute.

One autograd function computes all states of a graph, as a rule that of all cells. Nothing is
written to memory but those and the results of convolutions and poolings, before their batch norms:

- a separable convolution passes over a band of image rows at a time, whose depthwise result never
  leaves the cache and is computed again in backward;
- batch norm and ReLU are applied while the next operation reads, and so is the gradient of a batch
  norm, since by channel both are affine;
- all terms of a state are normalised, weighted and added up in one pass, and all gradients for a
  state are added up where they arise.

Forward and backward pass are programs, put together when they are first needed: a step fetches its
tensors, and runs them.

The gradients have no gradients of their own; PyTorch says so when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssnas.engine.batch_norm import check_scale
from ssnas.engine.cpu.lowering import (
    Convolved,
    Given,
    Inputs,
    Normalised,
    Norms,
    Part,
    Pooled,
    Projected,
    Result,
    State,
    Zeros,
)
from ssnas.engine.cpu.tape import Place, Program
from ssnas.engine.op_group import Term
from ssnas.networks.operations import ConvNorm, FactorizedReduce, Pool, Zero

PROGRAMS = 16
"""How many forward passes a plan keeps, for as many sizes of images and modes, and how many
backward passes each of them does, for as many needs: those that were used last."""


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _values(count: int, dtype: torch.dtype) -> Tensor:
    return _empty((count, 1, 1, 1), dtype).flatten()


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
        norms: all that there are.
        leaving: the parts to compute when a state, the last one that they read, is there.
        entering: those that each state consists of, and which of their targets it is.
        weighted: how many targets have a weight.
        weights: of the parts whose targets have some, which of all they are.
        read: for each state whether a part does.
        touched: for each sum whether it is entered or read; another one stays as it is.
    """

    def __init__(self, terms: Sequence[Term], given: int, sums: int) -> None:
        self.given, self.sums, self.inputs = given, sums, Inputs()
        self.parts = parts = [_part(term, self.inputs) for term in terms]
        modules = (module for term in terms for op in term.ops for module in op.modules())
        self.norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        self.weights: dict[Part, range] = {}
        self.weighted = 0
        for part in parts:
            if part.term.weighted:
                first, self.weighted = self.weighted, self.weighted + len(part.targets)
                self.weights[part] = range(first, self.weighted)
        # One that writes the whole gradient for what it reads goes first.
        ordered = sorted(parts, key=lambda part: not part.whole)
        states = range(given + sums)
        self.leaving = [
            [part for part in ordered if max(part.sources) == state] for state in states
        ]
        self.entering = [
            [(part, i) for part in parts for i, own in enumerate(part.targets) if own == state]
            for state in states
        ]
        self.read = [any(state in part.sources for part in parts) for state in states]
        self.touched = [bool(self.entering[state]) or self.read[state] for state in states[given:]]
        self._programs: dict[tuple, Forward] = {}

    def statistics(self, dtype: torch.dtype) -> list[Tensor]:
        """Running mean and variance, and number of batches, of all norms.

        Raises:
            TypeError: for statistics that the kernels cannot read and write.
        """
        types = dtype, dtype, torch.int64
        found = []
        for norm in self.norms:
            own = norm.running_mean, norm.running_var, norm.num_batches_tracked
            for tensor, kind in zip(own, types, strict=True):
                usable = tensor is not None and tensor.is_cpu and tensor.is_contiguous()
                if not usable or tensor.dtype != kind:
                    raise TypeError(
                        "running statistics must be dense, on the CPU, and of the images' type; "
                        "the number of batches, of int64"
                    )
            found += own
        return found

    def forward(self, tensors: Sequence[Tensor | None], keeps: bool) -> Forward:
        """The program for such tensors, and for the norms' modes."""
        modes = [
            (norm.training, norm.track_running_stats, norm.momentum, norm.eps)
            for norm in self.norms
        ]
        shapes = [None if tensor is None else tensor.shape for tensor in tensors]
        dtype = tensors[0].dtype
        key = (dtype, keeps, *shapes, *modes)
        return _kept(self._programs, key, lambda: Forward(self, dtype, shapes, keeps))


def _kept(programs: dict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    """The program that is kept for this key, or else a new one."""
    own = programs.pop(key, None) or make()
    if len(programs) == PROGRAMS:
        del programs[next(iter(programs))]
    programs[key] = own
    return own


class Forward:
    """The program that computes the sums.

    A run takes its memory, the given states, the weights, what is added to the sums, the tensors of
    `Inputs`, the norms' statistics, and the sums.

    Args:
        shapes: of the tensors before the statistics, None for those that there are not.
        keeps: whether a backward pass may follow.

    Attributes:
        states: all, None for those without a value.
        tensors: those of `Inputs`.
        statistics: running mean and variance, and number of batches, of each norm.
        results: of all parts.
        sums: those to be computed.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: torch.dtype,
        shapes: Sequence[tuple[int, ...] | None],
        keeps: bool,
    ) -> None:
        self.plan, self.keeps = plan, keeps
        self.program = Program(dtype)
        places = [self.program.tensor(() if shape is None else shape) for shape in shapes]
        found = [
            None if shape is None else place for place, shape in zip(places, shapes, strict=True)
        ]
        given, (self.scale, *rest) = found[: plan.given], found[plan.given :]
        self.states: list[Place | None] = [*given, *rest[: plan.sums]]
        self.tensors: list[Place] = rest[plan.sums :]
        self.statistics = {
            norm: tuple(self.program.tensor(()) for _ in range(3)) for norm in plan.norms
        }
        self.results: dict[Part, Result] = {}
        self.sums: list[Place] = []
        for state, leaving in enumerate(plan.leaving):
            if state >= plan.given and plan.touched[state - plan.given]:
                self._mix(state)
            for part in leaving:
                self.results[part] = part.forward(self)
        self._programs: dict[tuple, Backward] = {}

    def drop(self, *places: Place) -> None:
        """Give back results that only a backward pass reads any more."""
        if not self.keeps:
            self.program.free(*places)

    def _mix(self, state: int) -> None:
        entering, before = self.plan.entering[state], self.states[state]
        first = before if before is not None else self.results[entering[0][0]].of(0)
        x = self.program.tensor(first.shape)
        terms = [self.term(part, i) for part, i in entering]
        self.program.call("mix", terms, len(terms), x.channels, x.pixels, before, x)
        self.states[state] = x
        self.sums.append(x)
        self.drop(*{self.results[part].y for part, _ in entering if max(part.targets) == state})

    def term(self, part: Part, i: int) -> tuple:
        """What a part brings to its i-th target, as `Term` of kernels.cpp."""
        result, scale = self.results[part], None
        if self.scale is not None and part.term.weighted:
            scale = self.scale.part(self.plan.weights[part][i], 1)
        channels = result.channels
        norm = result.norm.of(channels, result.first(i), i * channels, scale)
        return result.of(i), norm, result.y.channels

    def backward(self, needs: Sequence[bool], given: Sequence[bool]) -> Backward:
        """The program for the gradients that are needed, from those that are given; see there."""
        return _kept(self._programs, (*needs, *given), lambda: Backward(self, needs, given))


class Backward:
    """The program that computes the gradients.

    A run takes the tensors of the forward pass's run, its memory, one tensor for all gradients for
    weights and `Inputs`, the gradients given for the sums, and those for states that are asked for.

    Args:
        needs: for each of the tensors before the statistics whether its gradient is needed.
        given: for each sum whether a gradient for it is given.

    Attributes:
        wanted: for each state whether its gradient is needed, for itself or what it comes from.
        gradients: for the states, or None where there is nothing yet.
        found: the gradients for `Inputs` and weights, one after the other.
        returned: gradients for states that are tensors of their own.
    """

    def __init__(self, forward: Forward, needs: Sequence[bool], given: Sequence[bool]) -> None:
        plan = self.plan = forward.plan
        self.forward, self.states, self.tensors = forward, forward.states, forward.tensors
        self.program = Program(forward.program.dtype, after=forward.program)
        self._found = self.program.tensor(())
        self.found: list[Place] = []
        self._of_tensors: dict[int, Place] = {}
        of_given, (of_scale, *rest) = needs[: plan.given], needs[plan.given :]
        self._of_states, self._needed = [*of_given, *rest[: plan.sums]], rest[plan.sums :]
        self.wanted = self._wanted(of_scale)
        self._of_scale = self._new((plan.weighted,)) if of_scale else None
        if of_scale:
            self.program.call("clear", self._of_scale, plan.weighted)
        self._factors = self._cleared_factors()
        self.gradients: list[Place | None] = [None] * len(self.states)
        self.returned: list[Place] = []
        self._entered: set[int] = set()
        self._start(given)
        for state in reversed(range(len(self.states))):
            for part in plan.leaving[state]:
                self._leave(part)
            if state >= plan.given and self.gradients[state] is not None:
                self._enter(state)
            self._free_after(state)
        own = [
            place if need else None
            for place, need in zip(self.gradients, self._of_states, strict=True)
        ]
        of_tensors = [self._of_tensors.get(i) for i in range(len(self.tensors))]
        results = *own[: plan.given], self._of_scale, *own[plan.given :], *of_tensors
        self._results = [place and self._index(place) for place in results]

    def _wanted(self, of_scale: bool) -> list[bool]:
        wanted = list(self._of_states)
        for state, entering in enumerate(self.plan.entering):
            wanted[state] |= any(
                any(wanted[source] for source in part.sources)
                or part.learns(self)
                or (of_scale and part.term.weighted)
                for part, _ in entering
            )
        return wanted

    def _cleared_factors(self) -> dict[Part, Place]:
        """Of all parts factor, slope and offset for what is given behind their norms; zeros."""
        results = self.forward.results.items()
        shapes = [(3 * len(part.targets) * own.channels,) for part, own in results]
        factors = self.program.empty(sum(count for (count,) in shapes))
        self.program.call("clear", factors, factors.count)
        return dict(zip(self.forward.results, factors.parts(shapes), strict=True))

    def _new(self, shape: tuple[int, ...]) -> Place:
        """A further place among all that was found."""
        start = sum(place.count for place in self.found)
        self.found.append(Place(self._found.tensor, start, shape))
        return self.found[-1]

    def _index(self, place: Place) -> int:
        """Of a result among the tensors of a run and then all that was found."""
        if place.tensor != self._found.tensor:
            return place.tensor - 1
        return self.program.tensors + self.found.index(place)

    def _start(self, given: Sequence[bool]) -> None:
        """From the gradients given for the sums, which may be others' too."""
        sums = [state for state, own in enumerate(self.plan.touched, self.plan.given) if own]
        known = [state for state, is_given in zip(sums, given, strict=True) if is_given]
        places = [self.program.tensor(self.states[state].shape) for state in known]
        for state, place in zip(known, places, strict=True):
            if not self.wanted[state]:
                continue
            self.gradients[state] = place
            if self.plan.read[state]:
                own = self.gradients[state] = self._of_state(state)
                self.program.call("mix", (), 0, own.channels, own.pixels, place, own)

    def _of_state(self, state: int) -> Place:
        shape = self.states[state].shape
        if not self._of_states[state]:
            return self.program.empty(*shape)
        self.returned.append(self.program.tensor(shape))
        return self.returned[-1]

    def needs(self, *places: slice | None) -> bool:
        """Whether a gradient for one of those tensors is needed."""
        return any(any(self._needed[where]) for where in places if where is not None)

    def of_tensors(self, where: slice) -> list[Place]:
        """Where the gradients for those tensors belong."""
        return [self._of_tensor(i) for i in range(where.start, where.stop)]

    def _of_tensor(self, i: int) -> Place:
        shape = self.tensors[i].shape
        if not self._needed[i]:
            return self.program.empty(*shape)
        if i not in self._of_tensors:
            self._of_tensors[i] = self._new(shape)
        return self._of_tensors[i]

    def of_affine(self, norms: Norms | None) -> Sequence[Place | None]:
        """Those for the norms' weights and biases, None if they are not needed."""
        if norms is None or not self.needs(norms.affine):
            return None, None
        return self.of_tensors(norms.affine)

    def of_state(self, state: int, whole: bool = True) -> tuple[Place | None, bool]:
        """Where the gradient for a state belongs, None if it is not needed; and whether to add it.

        Args:
            whole: whether the caller can write all of it, instead of adding to what there is.
        """
        if not self.wanted[state]:
            return None, False
        adds = not whole or self.gradients[state] is not None
        if self.gradients[state] is None:
            own = self.gradients[state] = self._of_state(state)
            if not whole:
                self.program.call("clear", own, own.count)
        return self.gradients[state], adds

    def _enter(self, state: int) -> None:
        """Find what the norms of the terms of a state need of its gradient."""
        self._entered.add(state)
        own, entering = self.gradients[state], self.plan.entering[state]
        terms = [self.forward.term(part, i) for part, i in entering]
        found = [self._found_for(part, i) for part, i in entering]
        self.program.call("mix_backward", terms, found, len(terms), own.channels, own.pixels, own)

    def _found_for(self, part: Part, i: int) -> tuple[Place | None, ...]:
        """Where that of a part's i-th target belongs, as `Found` of kernels.cpp."""
        result, factors = self.forward.results[part], self._factors[part]
        channels, distance = result.channels, factors.count // 3
        first, slope = i * channels, distance + result.first(i)
        of_scale = None
        if self._of_scale is not None and part.term.weighted:
            of_scale = self._of_scale.part(self.plan.weights[part][i], 1)
        return (
            *(factors.part(start, channels) for start in (first, slope, slope + distance)),
            *(own and own.part(first, channels) for own in self.of_affine(part.norms)),
            of_scale,
        )

    def _leave(self, part: Part) -> None:
        """Take the gradients for a part's targets to what it comes from."""
        result = self.forward.results[part]
        channels = result.channels
        unreached = [i for i, target in enumerate(part.targets) if target not in self._entered]
        if len(unreached) == len(part.targets):
            return
        beyond = [self.of_state(target, whole=False)[0] for target in part.targets]
        if any(gradient is None for gradient in beyond):
            return
        for own in self.of_affine(part.norms):
            if own is not None:
                for i in unreached:
                    self.program.call("clear", own.part(i * channels, channels), channels)
        given = Given(beyond, channels, result.y, self._factors[part])
        part.backward(given, result, self)

    def _free_after(self, state: int) -> None:
        """Give back the gradients that no part reads any more."""
        for own, entering in enumerate(self.plan.entering):
            until = min((max(part.sources) for part, _ in entering), default=own)
            if until == state and self.gradients[own] is not None:
                self.program.free(self.gradients[own])

    def run(
        self, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients for all tensors before the statistics, None for those not needed.

        Args:
            tensors: those of the forward pass.
            gradients: those given.
        """
        dtype = self.program.dtype
        counts = [place.count for place in self.found]
        memory, found = _values(self.program.size, dtype), _values(sum(counts), dtype)
        returned = [_empty(place.shape, dtype) for place in self.returned]
        run = [*tensors, memory, found, *gradients, *returned]
        for place in self.states:
            if place is not None:
                # Hooks on saved tensors may have brought them to another layout.
                run[place.tensor - 1] = _dense(run[place.tensor - 1])
        self.program.run(*run)
        parts = zip(found.split(counts), self.found, strict=True)
        run += (own.view(place.shape) for own, place in parts)
        return [None if i is None else run[i] for i in self._results]


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
    if scale is not None and len(scale) != plan.weighted:
        raise ValueError(f"{plan.weighted} edges need as many weights; found {len(scale)}")
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
    statistics = plan.statistics(given[0].dtype)
    forward = plan.forward(tensors, torch.is_grad_enabled())
    sums = iter(_Mixed.apply(forward, statistics, *tensors))
    return [
        next(sums) if touched else old for touched, old in zip(plan.touched, before, strict=True)
    ]


class _Mixed(torch.autograd.Function):
    """`mix` of dense tensors."""

    @staticmethod
    def forward(ctx, forward, statistics, *tensors):
        plan, dtype = forward.plan, forward.program.dtype
        memory = _values(forward.program.size, dtype)
        sums = tuple(_empty(place.shape, dtype) for place in forward.sums)
        forward.program.run(memory, *tensors, *statistics, *sums)
        ctx.program = forward
        if forward.keeps:
            # A backward pass reads neither what is added to sums nor statistics.
            first, last = plan.given + 1, plan.given + 1 + plan.sums
            kept = *tensors[:first], *[None] * plan.sums, *tensors[last:]
            ctx.save_for_backward(memory, *kept, *[None] * len(statistics), *sums)
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        _, _, *needs = ctx.needs_input_grad
        given = [gradient is not None for gradient in gradients]
        known = [_dense(gradient) for gradient in gradients if gradient is not None]
        return None, None, *ctx.program.backward(needs, given).run(ctx.saved_tensors, known)
