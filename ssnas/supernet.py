"""The relaxed network, with all operations on every edge, and its plain twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssnas.cell import Cell, CellStack
from ssnas.errors import InputError
from ssnas.space import CELL_KINDS, EDGES, NUM_INPUTS, NUM_STATES, RELAXATIONS

ALPHA_STD = 1e-3


class Supernet(CellStack):
    """All candidate operations on every edge, weighted by w(α).

    w is the softmax over an edge's operations (DARTS, Liu et al. 2019) or the elementwise sigmoid
    (FairDARTS, Chu et al. 2020). The α of a cell kind are shared by all cells of that kind.

    With `partial` K > 1 the operations see 1/K of the channels, so that the search keeps far fewer
    activations, and edges are normalised (PC-DARTS, Xu et al. 2020; see `Cell`): each has a β,
    shared as the α are, whose softmax over the edges into the same node multiplies the edge.

    Args:
        channels: C of the first cell.
        num_cells: L.
        in_channels: channels of the images.
        relaxation: `softmax` or `sigmoid`.
        stem_multiplier: the stem has `stem_multiplier` · C channels.
        num_classes: outputs of a linear classifier on the features; without one, `forward` returns
            the features themselves.
        partial: K, a divisor of `channels`; above 1 with the relaxation `softmax` alone.

    Raises:
        InputError: for an unknown relaxation, or a `partial` that is not accepted.
    """

    def __init__(
        self,
        channels: int,
        num_cells: int,
        in_channels: int = 3,
        relaxation: str = "sigmoid",
        stem_multiplier: int = 3,
        num_classes: int | None = None,
        partial: int = 1,
    ) -> None:
        if relaxation not in RELAXATIONS:
            raise InputError(
                f"search.relaxation: unknown {relaxation!r}; choose from {', '.join(RELAXATIONS)}"
            )
        if partial > 1 and relaxation != "softmax":
            raise InputError(
                f"search.partial: found {partial} with relaxation {relaxation}; above 1 it is "
                "accepted with relaxation softmax"
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
            partial=partial,
        )
        self.relaxation = relaxation
        self.ops = self_ops
        self.alphas = nn.ParameterDict(
            {kind: ALPHA_STD * torch.randn(len(EDGES), len(self_ops)) for kind in CELL_KINDS}
        )
        self.betas = nn.ParameterDict(
            {kind: ALPHA_STD * torch.randn(len(EDGES)) for kind in CELL_KINDS if partial > 1}
        )
        self.classifier = (
            nn.Identity() if num_classes is None else nn.Linear(self.out_features, num_classes)
        )

    def architecture(self) -> dict[str, Tensor]:
        """w(α), with partial channels β·w(α), of each cell kind, (14, ops)."""
        return {
            kind: relax(alpha, self.relaxation, self.betas.get(kind))
            for kind, alpha in self.alphas.items()
        }

    def architecture_parameters(self) -> list[nn.Parameter]:
        """All α and β."""
        return [*self.alphas.values(), *self.betas.values()]

    def weights(self) -> list[nn.Parameter]:
        """ω: every parameter but the α and β."""
        searched = ("alphas.", "betas.")
        return [p for name, p in self.named_parameters() if not name.startswith(searched)]

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


def relax(alpha: Tensor, relaxation: str, beta: Tensor | None = None) -> Tensor:
    """w(α), (14, ops), of one cell kind's α: softmax over an edge's ops, or elementwise sigmoid.

    Args:
        beta: with partial channels, β, (14,): the w of edge (i, j) are multiplied by
            exp(β_ij) / Σ_{i'<j} exp(β_i'j).
    """
    weights = alpha.sigmoid() if relaxation == "sigmoid" else alpha.softmax(dim=-1)
    if beta is None:
        return weights
    # The edges are ordered by target, and state j is entered by j of them.
    entering = beta.split(tuple(range(NUM_INPUTS, NUM_STATES)))
    return torch.cat([edges.softmax(dim=0) for edges in entering])[:, None] * weights


def architecture_of(weights: Mapping[str, Tensor], relaxation: str) -> dict[str, Tensor]:
    """What `Supernet.architecture` returns, from a saved supernet.

    Args:
        weights: a state dict: `alphas.*`, with partial channels `betas.*`, and others, ignored.
        relaxation: as of `Supernet`.

    Returns:
        for each kind that has α the (β·)w(α), (14, ops).
    """
    return {
        kind: relax(weights[f"alphas.{kind}"], relaxation, weights.get(f"betas.{kind}"))
        for kind in (name.removeprefix("alphas.") for name in weights if name.startswith("alphas."))
    }


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
