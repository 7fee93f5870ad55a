"""Which images a training step sees: samplers, and an epoch's batches drawn by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssnas.errors import InputError


def instance(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices in which every image appears equally often: one permutation after another."""
    rounds = -(-count // len(members))
    drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
    return torch.cat(drawn)[:count]


def balanced(members: Tensor, count: int, generator: torch.Generator, labels: Tensor) -> Tensor:
    """`count` indices, each by drawing a class uniformly and then an image of that class.

    The class-balanced sampler of re-sampling and of BBN's second branch (Zhou et al. 2020); with
    replacement, so an image of a rare class appears often.

    Args:
        members: indices to draw from.
        labels: (N,) class indices of all images.
    """
    own = labels[members]
    classes, counts = own.unique(return_counts=True)
    by_class = members[own.argsort(stable=True)]
    chosen = torch.randint(len(classes), (count,), generator=generator)
    within = (torch.rand(count, generator=generator) * counts[chosen]).long()
    starts = counts.cumsum(0) - counts
    return by_class[starts[chosen] + within.clamp(max=counts[chosen] - 1)]


SAMPLERS = {"instance": ("instance",), "balanced": ("balanced",)}
SAMPLERS["bilateral"] = ("instance", "balanced")
"""The samplers of each scheme; under `bilateral` every step sees a batch of both."""


def draw_batches(
    parts: Sequence[Tensor],
    scheme: str,
    batch_size: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """An epoch's batches, (steps, batch, parts, samplers): one pass through the last part.

    Args:
        parts: disjoint sets of indices, of which each step sees one batch each. The last one is
            the part that ω is trained on; its short last batch is dropped.
        scheme: a key of `SAMPLERS`.
        labels: (N,) class indices, which `balanced` and `bilateral` read.

    Raises:
        InputError: if the scheme needs one label an image and there is none.
    """
    samplers = SAMPLERS[scheme]
    if "balanced" in samplers and (labels is None or labels.ndim != 1):
        raise InputError(
            f"sampling: found {scheme!r}, which needs one label an image; accepted: instance"
        )
    steps = len(parts[-1]) // batch_size
    columns = [
        instance(part, steps * batch_size, generator)
        if sampler == "instance"
        else balanced(part, steps * batch_size, generator, labels)
        for part in parts
        for sampler in samplers
    ]
    shape = (steps, batch_size, len(parts), len(samplers))
    return torch.stack(columns, dim=1).view(shape)
