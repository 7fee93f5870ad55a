"""A cell: operations on the edges of a small graph, relaxed (supernet) or chosen (network)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.operations import (
    ConvNorm,
    FactorizedReduce,
    Pool,
    Rectified,
    Zero,
    build,
    bypass,
    channel_shuffle,
    phases,
)
from ssnas.space import EDGES, NUM_INPUTS, NUM_NODES, NUM_STATES, cell_kinds


class Cell(nn.Module):
    """x_j = Σ_{i<j} Σ_o w_o(α_ij) o(x_i); the output is the concatenation of the nodes.

    With partial channel connections (PC-DARTS, Xu et al. 2020; K = `partial` > 1) the operations
    see the first C/K channels of a state, x_i', and the others, x_i'', bypass them:

        x_j = Σ_{i<j} shuffle_K([Σ_o w_o o(x_i'), (Σ_o w_o) bypass(x_i'')])

    where the bypass is the identity, or 2×2 max pooling at stride 2, and the shuffle of K groups
    shows the next edges other channels. Since w_o is the edge's normalised β times a softmax,
    Σ_o w_o is that β, which so multiplies the whole edge.

    `forward` equals `forward_by_definition`, term by term, and does less work:

    - edges that leave one state see the same tensor, so its ReLU, its poolings with their
      (parameter-free) batch norm and its identity are computed once and weighted per edge;
    - the weight of a convolution goes into its last batch norm (`operations.ScaledNorm`);
    - sums accumulate in place, so no term outlives its addition;
    - the shuffle is linear, so it is applied to the sum over a node's edges.

    Args:
        ops: for each edge of `space.EDGES`, by its index, the operations that it carries.
        previous: channels of the two inputs.
        channels: C, the channels of each node.
        reduce: whether edges from the inputs have stride 2.
        previous_reduce: whether the last cell halved the resolution, so that input 0 is twice
            as large as input 1.
        affine: whether batch norms have affine parameters.
        partial: K; the operations see C/K channels.

    Raises:
        InputError: if K does not divide C.
    """

    def __init__(
        self,
        ops: Mapping[int, Sequence[str]],
        previous: tuple[int, int],
        channels: int,
        reduce: bool,
        previous_reduce: bool,
        affine: bool,
        partial: int = 1,
    ) -> None:
        super().__init__()
        divisors = [divisor for divisor in range(1, channels + 1) if channels % divisor == 0]
        if partial not in divisors:
            raise InputError(
                f"search.partial: found {partial}, which does not divide the {channels} channels; "
                f"choose from {', '.join(map(str, divisors))}"
            )
        self.reduce = reduce
        self.partial = partial
        self._seen = channels // partial
        adapt = FactorizedReduce if previous_reduce else ConvNorm
        self.preprocess0 = adapt(previous[0], channels, affine)
        self.preprocess1 = ConvNorm(previous[1], channels, affine)
        self.edges = nn.ModuleDict(
            {
                str(edge): nn.ModuleDict(
                    {op: build(op, self._seen, self._stride(source), affine) for op in ops[edge]}
                )
                for edge, (source, _) in enumerate(EDGES)
                if ops.get(edge)
            }
        )
        self._leaving = [
            [(edge, target) for edge, (start, target) in enumerate(EDGES) if start == source]
            for source in range(NUM_STATES - 1)
        ]

    def _stride(self, source: int) -> int:
        return 2 if self.reduce and source < NUM_INPUTS else 1

    def _split(self, source: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The channels that operations see, and what the others bring to the edges' targets."""
        if self.partial == 1:
            return state, None
        seen, other = state.split((self._seen, state.shape[1] - self._seen), dim=1)
        return seen, bypass(other, self._stride(source))

    def forward_by_definition(
        self, s0: Tensor, s1: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The equations above, one operation at a time: the specification of `forward`."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(NUM_INPUTS, NUM_STATES):
            terms = []
            for edge, (source, target) in enumerate(EDGES):
                if target == node and str(edge) in self.edges:
                    row = None if weights is None else weights[edge]
                    terms += self._edge_by_definition(edge, source, states[source], row)
            states.append(sum(terms))
        return torch.cat(states[NUM_INPUTS:], dim=1)

    def _edge_by_definition(
        self, edge: int, source: int, state: Tensor, weights: Tensor | None
    ) -> list[Tensor]:
        """The terms that an edge adds to its node."""
        seen, other = self._split(source, state)
        ops = self.edges[str(edge)].values()
        if weights is None:
            values = [op(seen) for op in ops]
        else:
            values = [weight * op(seen) for weight, op in zip(weights, ops, strict=True)]
        if other is None:
            return values
        other = other if weights is None else weights.sum() * other
        joint = torch.cat([sum(values), other], dim=1)
        return [nn.functional.channel_shuffle(joint, self.partial)]

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | None = None) -> Tensor:
        """Outputs of the nodes, concatenated.

        Args:
            s0, s1: outputs of the cell before last and of the last cell, (N, channels, H, W).
            weights: w(α), (14, ops), or None where every operation, and a bypass, counts once.

        Returns:
            (N, 4 C, H', W'), H' = H of `s1`, halved (rounded up) in a reduction cell.
        """
        halving = isinstance(self.preprocess0, FactorizedReduce)
        first = self.preprocess0.on_phases(phases(s0.relu())) if halving else self.preprocess0(s0)
        states = [first, self.preprocess1(s1)]
        sums: list[Tensor | None] = [None] * NUM_NODES
        bypassed: list[Tensor | None] = [None] * NUM_NODES
        for source, leaving in enumerate(self._leaving):
            seen, other = self._split(source, states[source])
            if other is not None:
                # One dense copy spares every pooling its own.
                seen = seen.contiguous(memory_format=torch.channels_last)
            shared = _SharedInput(seen, self._stride(source) == 2)
            for edge, target in leaving:
                if str(edge) not in self.edges:
                    continue
                node = target - NUM_INPUTS
                for index, (name, op) in enumerate(self.edges[str(edge)].items()):
                    scale = None if weights is None else weights[edge, index]
                    sums[node] = shared.add(sums[node], name, op, scale)
                if other is not None:
                    scale = None if weights is None else weights[edge].sum()
                    bypassed[node] = _accumulate(bypassed[node], other, scale)
            if source >= NUM_INPUTS - 1:
                node = source + 1 - NUM_INPUTS
                if self.partial > 1:
                    joint = _Concatenate.apply(sums[node], bypassed[node])
                    sums[node] = channel_shuffle(joint, self.partial)
                states.append(sums[node])
        return _Concatenate.apply(*states[NUM_INPUTS:])


class _Concatenate(torch.autograd.Function):
    """Concatenation of channels whose gradients are dense.

    PyTorch returns the gradients as slices of one tensor; batch norm's backward is twenty times
    slower on those, and many of them start from each node.
    """

    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        parts = gradient.split(ctx.widths, dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


class _SharedInput:
    """One state, and what all edges that leave it have in common."""

    def __init__(self, state: Tensor, halve: bool) -> None:
        self.state = state
        self.halve = halve
        self.rectified: Tensor | None = None
        self.pooled: dict[str, tuple[Pool, Tensor]] = {}

    def add(self, total: Tensor | None, name: str, op: nn.Module, scale: Tensor | None) -> Tensor:
        """`total` + `scale` · `op`(state)."""
        if isinstance(op, Rectified):
            if self.rectified is None:
                self.rectified = self.state.relu()
                if self.halve:
                    self.rectified = phases(self.rectified)
            apply = op.on_phases if self.halve else op.after_relu
            term = apply(self.rectified, scale)
            return term if total is None else total.add_(term)
        if isinstance(op, Zero):
            return op(self.state) if total is None else total
        value = self._pool(name, op) if isinstance(op, Pool) else self.state
        return _accumulate(total, value, scale)

    def _pool(self, name: str, op: Pool) -> Tensor:
        if name not in self.pooled:
            self.pooled[name] = (op, op(self.state))
            return self.pooled[name][1]
        twin, value = self.pooled[name]
        if op.training and op.norm.track_running_stats:
            op.norm.running_mean.copy_(twin.norm.running_mean)
            op.norm.running_var.copy_(twin.norm.running_var)
            op.norm.num_batches_tracked.copy_(twin.norm.num_batches_tracked)
        return value


def _accumulate(total: Tensor | None, value: Tensor, scale: Tensor | None) -> Tensor:
    """`total` + `scale` · `value`, in place."""
    if total is None:
        return value.clone() if scale is None else value * scale
    return total.add_(value) if scale is None else total.addcmul_(value, scale)


class CellStack(nn.Module):
    """Stem and cells, common to supernet and network: images to pooled features.

    Channels start at `channels` and double at each reduction cell.

    Args:
        ops: for each cell kind, the operations of each edge (see `Cell`).
        channels: C of the first cell.
        num_cells: L.
        in_channels: channels of the images.
        stem_multiplier: the stem has `stem_multiplier` · C channels.
        affine: whether the cells' batch norms have affine parameters.
        partial: K of the cells' partial channel connections.

    Attributes:
        out_features: length of the feature vector.
        channels: C of the last cell.
        last_widths: channels of the last two outputs, which a further cell would read.
    """

    def __init__(
        self,
        ops: Mapping[str, Mapping[int, Sequence[str]]],
        channels: int,
        num_cells: int,
        in_channels: int = 3,
        stem_multiplier: int = 3,
        affine: bool = True,
        partial: int = 1,
    ) -> None:
        super().__init__()
        width = stem_multiplier * channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.kinds = cell_kinds(num_cells)
        self.cells = nn.ModuleList()
        previous, previous_reduce = (width, width), False
        for kind in self.kinds:
            reduce = kind == "reduce"
            channels *= 2 if reduce else 1
            self.cells.append(
                Cell(ops[kind], previous, channels, reduce, previous_reduce, affine, partial)
            )
            previous, previous_reduce = (previous[1], NUM_NODES * channels), reduce
        self.channels, self.last_widths = channels, previous
        self.out_features = NUM_NODES * channels

    def features(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Globally average-pooled output of the last cell, (N, out_features).

        Args:
            x: images, (N, in_channels, H, W), normalised.
            weights: w(α) of each cell kind, or None.
        """
        return self.states(x, weights)[1].mean(dim=(2, 3))

    def states(
        self, x: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the last cell but one and of the last cell; arguments as of `features`."""
        s0 = s1 = self.stem(self.arrange(x))
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            s0, s1 = s1, self.run_cell(cell, s0, s1, None if weights is None else weights[kind])
        return s0, s1

    def arrange(self, x: Tensor) -> Tensor:
        """Channels-last, in which depthwise convolution, pooling and batch norm run fastest."""
        return x.contiguous(memory_format=torch.channels_last)

    def run_cell(self, cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor | None) -> Tensor:
        return cell(s0, s1, weights)
