"""What the states of cells consist of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ssnas.networks.operations import DepthwiseSeparable, SepConv, Zero


@dataclass(frozen=True)
class Term:
    """Operations of one kind on edges that leave the same states.

    Args:
        ops: of equal channels, kernels and strides; `nn.Identity` for the state itself, a
            batch norm for the state behind it.
        targets: for each of them the state that it is added to.
        sources: the state that all of them read, or several of one size, whose channels follow
            each other.
        weighted: whether a w_o multiplies what each of them gives.
    """

    ops: Sequence[nn.Module]
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    weighted: bool = True

    @property
    def norms(self) -> list[nn.BatchNorm2d] | None:
        """The batch norms at the operations' ends, if they have any."""
        match self.ops[0]:
            case nn.Identity() | Zero():
                return None
            case nn.BatchNorm2d():
                return list(self.ops)
        return [op.norm for op in self.ops]

    @property
    def layers(self) -> list[Sequence[DepthwiseSeparable]]:
        """The separable convolutions that the operations consist of, one layer after another."""
        match self.ops[0]:
            case SepConv():
                return [[op.first for op in self.ops], [op.second for op in self.ops]]
            case DepthwiseSeparable():
                return [self.ops]
        return []
