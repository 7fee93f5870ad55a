"""The relaxed network, with all operations on every edge, and its plain twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssnas.cell import Cell, CellStack
from ssnas.errors import InputError
from ssnas.space import CELL_KINDS, EDGES, RELAXATIONS

ALPHA_STD = 1e-3


class Supernet(CellStack):
    """All candidate operations on every edge, weighted by w(α).

    w is the softmax over an edge's operations (DARTS, Liu et al. 2019) or the elementwise sigmoid
    (FairDARTS, Chu et al. 2020). The α of a cell kind are shared by all cells of that kind.

    Args:
        channels: C of the first cell.
        num_cells: L.
        in_channels: channels of the images.
        relaxation: `softmax` or `sigmoid`.
        stem_multiplier: the stem has `stem_multiplier` · C channels.
        num_classes: outputs of a linear classifier on the features; without one, `forward` returns
            the features themselves.

    Raises:
        InputError: for an unknown relaxation.
    """

    def __init__(
        self,
        channels: int,
        num_cells: int,
        in_channels: int = 3,
        relaxation: str = "sigmoid",
        stem_multiplier: int = 3,
        num_classes: int | None = None,
    ) -> None:
        if relaxation not in RELAXATIONS:
            raise InputError(
                f"search.relaxation: unknown {relaxation!r}; choose from {', '.join(RELAXATIONS)}"
            )
        self_ops = RELAXATIONS[relaxation]
        every_edge = dict.fromkeys(range(len(EDGES)), self_ops)
        super().__init__(
            dict.fromkeys(CELL_KINDS, every_edge),
            channels,
            num_cells,
            in_channels,
            stem_multiplier,
            affine=False,
        )
        self.relaxation = relaxation
        self.ops = self_ops
        self.alphas = nn.ParameterDict(
            {kind: ALPHA_STD * torch.randn(len(EDGES), len(self_ops)) for kind in CELL_KINDS}
        )
        self.classifier = (
            nn.Identity() if num_classes is None else nn.Linear(self.out_features, num_classes)
        )

    def architecture(self) -> dict[str, Tensor]:
        """w(α) of each cell kind, (14, ops)."""
        return {kind: relax(alpha, self.relaxation) for kind, alpha in self.alphas.items()}

    def weights(self) -> list[nn.Parameter]:
        """ω: every parameter but the α."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas.")]

    def forward(self, x: Tensor, architecture: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features (N, out_features), or logits, of images (N, in_channels, H, W).

        Args:
            architecture: weights to use in place of w(α), for instance a one-hot choice.
        """
        chosen = self.architecture() if architecture is None else architecture
        return self.classifier(self.features(x, chosen))


class PlainSupernet(Supernet):
    """The same network computed as the published codes do: one operation at a time, contiguous.

    It is the specification of `Supernet` in tests and the reference in benchmarks; parameters
    and their names are the same.
    """

    def arrange(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def run_cell(self, cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor | None) -> Tensor:
        return cell.forward_by_definition(s0, s1, weights)


def relax(alpha: Tensor, relaxation: str) -> Tensor:
    """w(α), (14, ops), of one cell kind's α: softmax over an edge's ops, or elementwise sigmoid."""
    return alpha.sigmoid() if relaxation == "sigmoid" else alpha.softmax(dim=-1)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context, training-mode batch norms use batch statistics and record none.

    A step on α sees images that ω is not trained on; they must not enter the running statistics.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = [m for m in module.modules() if isinstance(m, kinds) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
