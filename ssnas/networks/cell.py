"""A cell: operations on the edges of a small graph, relaxed (supernet) or chosen (network)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.networks.operations import ConvNorm, FactorizedReduce, build, bypass
from ssnas.networks.space import EDGES, NUM_INPUTS, NUM_STATES


class Cell(nn.Module):
    """x_j = Σ_{i<j} Σ_o w_o(α_ij) o(x_i); the output is the concatenation of the nodes.

    With partial channel connections (PC-DARTS, Xu et al. 2020; K = `partial` > 1) the operations
    see the first C/K channels of a state, x_i', and the others, x_i'', bypass them:

        x_j = Σ_{i<j} shuffle_K([Σ_o w_o o(x_i'), (Σ_o w_o) bypass(x_i'')])

    where the bypass is the identity, or 2×2 max pooling at stride 2, and the shuffle of K groups
    shows the next edges other channels. Since w_o is the edge's normalised β times a softmax,
    Σ_o w_o is that β, which so multiplies the whole edge.

    `forward` is this definition, one operation at a time. A network computes the same faster, see
    `networks.cell_graph`.

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

    Example:
        >>> ops = dict.fromkeys(range(14), ("skip_connect",))
        >>> cell = Cell(ops, (6, 6), 4, reduce=True, previous_reduce=False, affine=True)
        >>> x = torch.zeros(2, 6, 8, 8)
        >>> cell(x, x).shape
        torch.Size([2, 16, 4, 4])
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
        self.weight_order: tuple[int, ...] | None = None
        self._seen = channels // partial
        adapt = FactorizedReduce if previous_reduce else ConvNorm
        self.preprocess0 = adapt(previous[0], channels, affine)
        self.preprocess1 = ConvNorm(previous[1], channels, affine)
        self.edges = nn.ModuleDict(
            {
                str(edge): nn.ModuleDict(
                    {op: build(op, self._seen, self.stride(source), affine) for op in ops[edge]}
                )
                for edge, (source, _) in enumerate(EDGES)
                if ops.get(edge)
            }
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor | None = None) -> Tensor:
        """Concatenate the outputs of the nodes.

        Args:
            s0, s1: outputs of the cell before last and of the last cell, (N, channels, H, W).
            weights: w(α), (14, ops), or None where every operation, and a bypass, counts once.

        Returns:
            (N, 4 C, H', W'), H' = H of `s1`, halved (rounded up) in a reduction cell.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(NUM_INPUTS, NUM_STATES):
            edges = [
                self._edge(edge, source, states[source], None if weights is None else weights[edge])
                for edge, (source, target) in enumerate(EDGES)
                if target == node and str(edge) in self.edges
            ]
            states.append(_total([term for edge in edges for term in edge]))
        return torch.cat(states[NUM_INPUTS:], dim=1)

    def _edge(self, edge: int, source: int, state: Tensor, weights: Tensor | None) -> list[Tensor]:
        """The terms that an edge adds to its node."""
        seen, other = self.split(source, state)
        ops = self.ops(edge).values()
        if weights is None:
            values = [op(seen) for op in ops]
        else:
            values = [weight * op(seen) for weight, op in zip(weights, ops, strict=True)]
        if other is None:
            return values
        other = other if weights is None else weights.sum() * other
        joint = torch.cat([_total(values), other], dim=1)
        return [nn.functional.channel_shuffle(joint, self.partial)]

    def ops(self, edge: int) -> dict[str, nn.Module]:
        """The operations on an edge of `space.EDGES`, by name."""
        return dict(cast(nn.ModuleDict, self.edges[str(edge)]).items())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters(), torch.empty(0)).device

    def stride(self, source: int) -> int:
        """The stride of the edges that leave a state."""
        return 2 if self.reduce and source < NUM_INPUTS else 1

    def split(self, source: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a state into the channels that operations see, and the others' bypass."""
        if self.partial == 1:
            return state, None
        seen, other = state.split((self._seen, state.shape[1] - self._seen), dim=1)
        return seen, bypass(other, self.stride(source))


def _total(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], start=terms[0])
