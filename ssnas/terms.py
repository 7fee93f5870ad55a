"""What the sums in a cell consist of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ssnas.operations import DepthwiseSeparable, SepConv


@dataclass(frozen=True)
class Term:
    """Operations of one kind on edges that leave a state.

    Args:
        ops: of equal channels, kernels and strides; `nn.Identity` for the state itself.
        edges: for each of them the index of the sum that it is added to.
        source: index of the state, among those given and then the sums.
        weighted: whether a w_o multiplies what each of them gives.
    """

    ops: Sequence[nn.Module]
    edges: tuple[int, ...]
    source: int = 0
    weighted: bool = True

    @property
    def norms(self) -> list[nn.BatchNorm2d] | None:
        """The batch norms at the operations' ends, if they have any."""
        return None if isinstance(self.ops[0], nn.Identity) else [op.norm for op in self.ops]

    @property
    def layers(self) -> list[Sequence[DepthwiseSeparable]]:
        """The separable convolutions that the operations consist of, one layer after another."""
        match self.ops[0]:
            case SepConv():
                return [[op.first for op in self.ops], [op.second for op in self.ops]]
            case DepthwiseSeparable():
                return [self.ops]
        return []
