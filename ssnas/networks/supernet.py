"""The relaxed network, with all operations on every edge, and its plain twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ssnas.errors import InputError
from ssnas.networks.backbone import Backbone
from ssnas.networks.cell import Cell
from ssnas.networks.operations import RELAXATIONS
from ssnas.networks.space import CELL_KINDS, EDGES, NUM_INPUTS, NUM_STATES

ALPHA_STD = 1e-3


class Supernet(Backbone):
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
        stem: see `backbone.STEMS`.
        checkpoint: of each cell keep the inputs alone, and compute what its backward pass needs
            once more when that comes (Chen et al. 2016): same result and same gradients, with
            the memory of the largest cell instead of all, for one more forward pass.

    Raises:
        InputError: for an unknown relaxation or stem, or a `partial` that is not accepted.
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
        stem: str = "cifar",
        checkpoint: bool = False,
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
        ops = RELAXATIONS[relaxation]
        every_edge = dict.fromkeys(range(len(EDGES)), ops)
        super().__init__(
            dict.fromkeys(CELL_KINDS, every_edge),
            channels,
            num_cells,
            in_channels,
            stem_multiplier,
            affine=False,
            partial=partial,
            stem=stem,
        )
        self.checkpoint = checkpoint
        if checkpoint:
            self.cell_by_cell = True
        self.relaxation = relaxation
        self.ops = ops
        self.alphas = nn.ParameterDict(
            {kind: ALPHA_STD * torch.randn(len(EDGES), len(ops)) for kind in CELL_KINDS}
        )
        self.betas = nn.ParameterDict(
            {kind: ALPHA_STD * torch.randn(len(EDGES)) for kind in CELL_KINDS if partial > 1}
        )
        self.classifier = (
            nn.Identity() if num_classes is None else nn.Linear(self.out_features, num_classes)
        )

    def architecture(self) -> dict[str, Tensor]:
        """w(α), with partial channels β·w(α), of each cell kind, (14, ops)."""
        return _relaxed(dict(self.alphas.items()), dict(self.betas.items()), self.relaxation)

    def architecture_parameters(self) -> list[nn.Parameter]:
        """All α and β."""
        return [*self.alphas.values(), *self.betas.values()]

    def architecture_groups(self) -> list[list[nn.Parameter]]:
        """All α and β, in groups that learn at rates of their own: here one."""
        return [self.architecture_parameters()]

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

    def run_cell(self, cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor | None) -> Tensor:
        run = super().run_cell
        if not self.checkpoint:
            return run(cell, s0, s1, weights)
        return recompute_in_backward(
            run,
            cell,
            s0,
            s1,
            weights,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _repeated(cell)),
            preserve_rng_state=False,
        )


class PlainSupernet(Supernet):
    """The same network computed as the published codes do: one operation at a time, contiguous.

    It is the specification of `Supernet` in tests and the reference in benchmarks; parameters
    and their names are the same.
    """

    accelerated = False
    cell_by_cell = True

    def arrange(self, x: Tensor) -> Tensor:
        return x.contiguous()


def relax(alpha: Tensor, relaxation: str, beta: Tensor | None = None) -> Tensor:
    """Relax one cell kind's α to w(α), (14, ops): softmax over an edge's ops, or sigmoid.

    Args:
        beta: with partial channels, β, (14,): the w of edge (i, j) are multiplied by
            exp(β_ij) / Σ_{i'<j} exp(β_i'j).

    Example:
        >>> relax(torch.zeros(14, 2), "sigmoid")[0]
        tensor([0.5000, 0.5000])
        >>> relax(torch.zeros(14, 2), "softmax", beta=torch.zeros(14))[0]
        tensor([0.2500, 0.2500])
    """
    weights = alpha.sigmoid() if relaxation == "sigmoid" else alpha.softmax(dim=-1)
    if beta is None:
        return weights
    # The edges are ordered by target, and state j is entered by j of them.
    entering = beta.split(tuple(range(NUM_INPUTS, NUM_STATES)))
    return torch.cat([edges.softmax(dim=0) for edges in entering])[:, None] * weights


def architecture_of(weights: Mapping[str, Tensor], relaxation: str) -> dict[str, Tensor]:
    """Compute the w(α) of a saved supernet, as `Supernet.architecture` does.

    Args:
        weights: a state dict: `alphas.*`, with partial channels `betas.*`, and others, ignored.
        relaxation: as of `Supernet`.

    Returns:
        for each kind that has α the (β·)w(α), (14, ops).

    Example:
        >>> architecture_of({"alphas.normal": torch.zeros(14, 7)}, "sigmoid")["normal"].mean()
        tensor(0.5000)
    """
    alphas, betas = (
        {name.removeprefix(table): w for name, w in weights.items() if name.startswith(table)}
        for table in ("alphas.", "betas.")
    )
    return _relaxed(alphas, betas, relaxation)


def _relaxed(
    alphas: Mapping[str, Tensor], betas: Mapping[str, Tensor], relaxation: str
) -> dict[str, Tensor]:
    return {kind: relax(alpha, relaxation, betas.get(kind)) for kind, alpha in alphas.items()}


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode record no statistics within the context.

    A step on α sees images that ω is not trained on; they must not enter the running statistics.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> with frozen_statistics(norm):
        ...     y = norm(torch.randn(2, 1, 3, 3))
        >>> norm.running_mean
        tensor([0.])
    """
    norms = _recording(module)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _recording(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    norms = (m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    return [norm for norm in norms if norm.track_running_stats]


def _repeated(cell: Cell) -> AbstractContextManager[None]:
    """The context in which to compute a cell once more, for its backward pass."""
    # Batch norm saves other tensors where it records none, which the repetition must match.
    return _scratch_buffers(cell) if _recording(cell) else frozen_statistics(cell)


@contextmanager
def _scratch_buffers(module: nn.Module) -> Iterator[None]:
    """Let `module` write into copies of its buffers, which are dropped after the context."""
    buffers = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)
