"""The bilateral-branch supernet (H24): BBN with searched branches, and heterogeneous rates.

BBN (Zhou et al. 2020, *BBN: Bilateral-Branch Network with Cumulative Learning*, arXiv 1912.02413)
trains two branches on one backbone: one reads batches as the images come, the other class-balanced
batches. A mixing ratio a, the share of the former, falls in the course of training.
H24 searches backbone and branches with DARTS and slows the backbone's α as a falls (HLS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ssnas.config.schema import Search
from ssnas.errors import InputError
from ssnas.networks.cell import Cell
from ssnas.networks.cell_graph import prepare
from ssnas.networks.space import EDGES
from ssnas.networks.supernet import ALPHA_STD, Supernet

BRANCHES = ("instance", "balanced")
"""The branches, by the sampler that feeds them; the mixing ratio a is the share of the first."""


class BilateralSupernet(Supernet):
    """A relaxed backbone of L cells, and two branches of one normal cell and a classifier each.

    Each branch has its own α beside the backbone's, so that `architecture` returns the weights of
    `normal`, `reduce`, `instance` and `balanced`.

    Args:
        channels, num_cells, in_channels, relaxation, stem_multiplier: of the backbone, see
            `Supernet`.
        num_classes: C, outputs of each classifier.
        stem, checkpoint: see `Supernet`; the branches' cells are recomputed like the others.

    Raises:
        InputError: for an unknown relaxation or stem.
    """

    def __init__(
        self,
        channels: int,
        num_cells: int,
        in_channels: int = 3,
        relaxation: str = "softmax",
        stem_multiplier: int = 3,
        num_classes: int = 2,
        stem: str = "cifar",
        checkpoint: bool = False,
    ) -> None:
        super().__init__(
            channels,
            num_cells,
            in_channels,
            relaxation,
            stem_multiplier,
            stem=stem,
            checkpoint=checkpoint,
        )
        every_edge = dict.fromkeys(range(len(EDGES)), self.ops)
        after_reduction = self.kinds[-1] == "reduce"
        self.branches, self.classifiers = nn.ModuleDict(), nn.ModuleDict()
        for name in BRANCHES:
            cell = Cell(
                every_edge, self.last_widths, self.channels, False, after_reduction, affine=False
            )
            self.branches[name] = prepare(cell)
            self.classifiers[name] = nn.Linear(self.out_features, num_classes)
            self.alphas[name] = ALPHA_STD * torch.randn(len(EDGES), len(self.ops))

    def backbone_alphas(self) -> list[nn.Parameter]:
        """The α that the branches share."""
        return [alpha for name, alpha in self.alphas.items() if name not in BRANCHES]

    def branch_alphas(self) -> list[nn.Parameter]:
        """The α of the branches, in the order of `BRANCHES`."""
        return [self.alphas[name] for name in BRANCHES]

    def architecture_groups(self) -> list[list[nn.Parameter]]:
        """The backbone's α, and the branches'."""
        return [self.backbone_alphas(), self.branch_alphas()]

    def backbone_weights(self) -> list[nn.Parameter]:
        """The part of ω that the branches share: stem and cells."""
        return [*self.stem.parameters(), *self.cells.parameters()]

    def branch(
        self, x: Tensor, name: str, architecture: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits (N, C) of one branch for images (N, in_channels, H, W).

        Args:
            name: one of `BRANCHES`.
            architecture: weights to use in place of w(α).
        """
        chosen = self.architecture() if architecture is None else architecture
        return self._head(self.states(x, chosen), name, chosen)

    def forward(  # type: ignore[override]  # two branches have a ratio, no single architecture
        self, x: Tensor, ratio: float = 0.5
    ) -> Tensor:
        """Logits (N, C): a f_instance(x) + (1 − a) f_balanced(x), with one pass of the backbone.

        Args:
            ratio: a, in [0, 1]. A branch without a share is not computed.
        """
        chosen = self.architecture()
        states = self.states(x, chosen)
        return _mix(
            ratio,
            lambda: self._head(states, "instance", chosen),
            lambda: self._head(states, "balanced", chosen),
        )

    def mixed(self, x_instance: Tensor, x_balanced: Tensor, ratio: float) -> Tensor:
        """Logits (N, C) in training: a f_instance(x_u) + (1 − a) f_balanced(x_r).

        Each batch passes the backbone on its own, with its own batch statistics.

        Args:
            x_instance: x_u, drawn image by image.
            x_balanced: x_r, of the same shape, drawn class by class.
            ratio: a, in [0, 1]. A branch without a share is not computed: it gets no gradient
                and records no statistics.
        """
        return _mix(
            ratio,
            lambda: self.branch(x_instance, "instance"),
            lambda: self.branch(x_balanced, "balanced"),
        )

    def _head(
        self, states: tuple[Tensor, Tensor], name: str, architecture: Mapping[str, Tensor]
    ) -> Tensor:
        cell = cast(Cell, self.branches[name])
        output = self.run_cell(cell, *states, architecture[name])
        logits: Tensor = self.classifiers[name](output.mean(dim=(2, 3)))
        return logits


def bilateral_loss(
    logits: Tensor,
    targets_instance: Tensor,
    targets_balanced: Tensor,
    ratio: float,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute BBN's loss of mixed logits: a ℓ(f, y_u) + (1 − a) ℓ(f, y_r) (Zhou et al. 2020).

    Args:
        logits: f of `BilateralSupernet.mixed`, (N, C).
        targets_instance, targets_balanced: y_u and y_r, labels of the two batches.
        ratio: a, in [0, 1]. Labels without a share are not read.
        criterion: ℓ, called with logits and targets.

    Example:
        >>> logits, y_u, y_r = torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([1])
        >>> bilateral_loss(logits, y_u, y_r, 0.25, lambda f, y: y.sum() + 1.0)
        tensor(1.7500)
    """
    return _mix(
        ratio,
        lambda: criterion(logits, targets_instance),
        lambda: criterion(logits, targets_balanced),
    )


def _mix(ratio: float, instance: Callable[[], Tensor], balanced: Callable[[], Tensor]) -> Tensor:
    """a · instance + (1 − a) · balanced, without computing a branch that has no share."""
    shares = ((ratio, instance), (1 - ratio, balanced))
    first, *others = [share * compute() for share, compute in shares if share]
    return sum(others, start=first)


def parabolic(progress: float) -> float:
    """Compute BBN's schedule, a = 1 − (t/T)², of progress t/T.

    Example:
        >>> parabolic(0.5)
        0.75
    """
    return 1 - progress**2


def reverse_sigmoid(progress: float, steepness: float = 10.0) -> float:
    """Compute H24's a = 1 / (1 + exp(k (t/T − ½))) of progress t/T and steepness k.

    It is ½ at half-time and does not quite reach its limits.

    Example:
        >>> [round(reverse_sigmoid(progress), 3) for progress in (0, 0.5, 1)]
        [0.993, 0.5, 0.007]
    """
    # The same function as a tanh, which no k overflows.
    return (1 - math.tanh(steepness * (progress - 0.5) / 2)) / 2


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "parabolic": lambda progress, steepness: parabolic(progress),
    "reverse-sigmoid": reverse_sigmoid,
    "constant": lambda progress, steepness: 0.5,
    "class-head": lambda progress, steepness: 0.0,
}
"""The mixing ratio a, in [0, 1], of progress t/T and steepness. Under `class-head` (a = 0, of
H24's continuous learning) one branch trains alone."""


def mixing_ratio(schedule: str, epoch: int, epochs: int, steepness: float = 10.0) -> float:
    """Compute the mixing ratio a of an epoch.

    Args:
        schedule: a key of `SCHEDULES`.
        epoch: t, from 0 to `epochs` − 1.
        epochs: T.
        steepness: k of `reverse-sigmoid`; the other schedules have none.

    Raises:
        InputError: for an unknown schedule.

    Example:
        >>> [mixing_ratio("parabolic", epoch, epochs=4) for epoch in range(4)]
        [1.0, 0.9375, 0.75, 0.4375]
    """
    if schedule not in SCHEDULES:
        raise InputError(
            f"mixing.schedule: unknown {schedule!r}; choose from {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[schedule](epoch / epochs, steepness)


def backbone_rate(ratio: float) -> float:
    """Compute the factor of HLS on the learning rate of the backbone's α: g(a) = exp(1 − 1/a).

    g(0) = 0. H24 omits the formula and describes its course; g is our reading of it:

    - g(1) = 1, and g(a) < a for 0 < a < 1, since 1 − 1/a < ln a;
    - g vanishes well before a does, though it is 0 at a = 0 alone: all its derivatives are 0
      there, g(0.2) = 0.018 and g(0.1) = 0.00012;
    - g is flat at first in time, not in a: its slope at a = 1 is 1, and it is the parabolic
      schedule that makes it 1 − (t/T)² − ½ (t/T)⁴ − … there, as flat as a itself.

    Args:
        ratio: a, in [0, 1].

    Example:
        >>> [round(backbone_rate(ratio), 3) for ratio in (1, 0.5, 0.2, 0)]
        [1.0, 0.368, 0.018, 0.0]
    """
    return math.exp(1 - 1 / ratio) if ratio > 0 else 0.0


def build_supernet(
    config: Search, image_shape: tuple[int, int, int], num_classes: int | None
) -> Supernet | BilateralSupernet:
    """Build the supernet that a search trains: of two branches where it samples `bilateral`.

    Args:
        config: the supernet's sizes, relaxation, stem and sampling scheme.
        image_shape: (H, W, C) of the images.
        num_classes: outputs of its classifiers, or None for a supernet that gives features.

    Raises:
        InputError: for partial channels in a bilateral supernet, which has none.

    Example:
        >>> supernet = build_supernet(Search(channels=4), (8, 8, 3), num_classes=None)
        >>> supernet(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """
    *_, in_channels = image_shape
    stem = config.stem or "cifar"
    sizes = config.channels, config.cells, in_channels, config.relaxation, config.stem_multiplier
    if config.sampling != "bilateral":
        return Supernet(*sizes, num_classes, config.partial, stem, config.checkpoint)
    if config.partial > 1:
        raise InputError(
            f"search.partial: found {config.partial} with sampling bilateral; accepted is 1"
        )
    if num_classes is None:
        raise InputError("search.sampling: found bilateral without classes to tell apart")
    return BilateralSupernet(*sizes, num_classes, stem, config.checkpoint)
