"""The images that each training step sees: samplers, and an epoch's batches drawn by them.

To add a way of sampling, write its sampler here and give it a line in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssnas.errors import InputError

Sampler = Callable[..., Tensor]
"""A function (members, count, generator, labels) to indices (count,), all of them members."""


def instance(
    members: Tensor, count: int, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """Draw every image equally often: one permutation after another.

    Args:
        members: the indices to draw from.
        count: how many to draw.
        generator: a generator of the CPU.
        labels: not read.

    Returns:
        Indices (count,).

    Example:
        >>> drawn = instance(torch.tensor([3, 5, 8]), 6, torch.Generator().manual_seed(0))
        >>> sorted(drawn.tolist())
        [3, 3, 5, 5, 8, 8]
    """
    rounds = -(-count // len(members))
    drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
    return torch.cat(drawn)[:count]


def balanced(members: Tensor, count: int, generator: torch.Generator, labels: Tensor) -> Tensor:
    """Draw a class uniformly, then an image of that class, with replacement.

    This is the class-balanced sampler of re-sampling and of BBN's second branch (Zhou et al.
    2020): an image of a rare class appears often.

    Args:
        members: the indices to draw from.
        count: how many to draw.
        generator: a generator of the CPU.
        labels: class indices (N,) of all images.

    Returns:
        Indices (count,).

    Example:
        >>> labels = torch.tensor([0] * 98 + [1] * 2)
        >>> drawn = balanced(torch.arange(100), 1000, torch.Generator().manual_seed(0), labels)
        >>> 450 < (drawn >= 98).sum().item() < 550
        True
    """
    member_labels = labels[members]
    classes, counts = member_labels.unique(return_counts=True)
    by_class = members[member_labels.argsort(stable=True)]
    chosen = torch.randint(len(classes), (count,), generator=generator)
    within = (torch.rand(count, generator=generator) * counts[chosen]).long()
    starts = counts.cumsum(0) - counts
    return by_class[starts[chosen] + within.clamp(max=counts[chosen] - 1)]


class Scheme(NamedTuple):
    """A way of sampling.

    Attributes:
        samplers: of each of them every step sees a batch.
        needs_classes: whether they read one class label an image.
    """

    samplers: tuple[Sampler, ...]
    needs_classes: bool = False


SAMPLERS = {
    "instance": Scheme((instance,)),
    "balanced": Scheme((balanced,), needs_classes=True),
    "bilateral": Scheme((instance, balanced), needs_classes=True),
}


def draw_batches(
    parts: Sequence[Tensor],
    scheme: str,
    batch_size: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """Draw the batches of an epoch, which passes once through the last part.

    Args:
        parts: disjoint sets of indices; each step sees a batch of every part. The last is the
            part that ω is trained on, and its short last batch is dropped.
        scheme: a key of `SAMPLERS`.
        batch_size: the images of one part and sampler in a step.
        generator: a generator of the CPU.
        labels: class indices (N,), which `balanced` and `bilateral` read.

    Returns:
        Indices (steps, batch_size, parts, samplers).

    Raises:
        InputError: if the scheme needs one label an image and there is none.

    Example:
        Two parts of 4 and 10 images, in batches of 4:

        >>> parts = [torch.arange(4), torch.arange(4, 14)]
        >>> draw_batches(parts, "instance", 4, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 4, 2, 1])
    """
    samplers, needs_classes = SAMPLERS[scheme]
    if needs_classes and (labels is None or labels.ndim != 1):
        accepted = ", ".join(key for key, other in SAMPLERS.items() if not other.needs_classes)
        raise InputError(
            f"sampling: found {scheme!r}, which needs one label an image; accepted: {accepted}"
        )
    steps = len(parts[-1]) // batch_size
    columns = [
        sample(part, steps * batch_size, generator, labels) for part in parts for sample in samplers
    ]
    return torch.stack(columns, dim=1).view(steps, batch_size, len(parts), len(samplers))
