"""Figures that a search shows and does not use: w(α) by epoch, decided weights, and k-NN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssnas.data.views import Normalise
from ssnas.metrics import knn_accuracy
from ssnas.networks.space import CELL_KINDS, EDGES
from ssnas.networks.supernet import Supernet
from ssnas.runtime.device import autocast
from ssnas.training.images import TrainingImages

DECIDED = (0.15, 0.85)
"""A weight w(α) below the first or above the second counts as decided."""


class AlphaLog:
    """The weights w(α) of every operation and edge after every epoch, as rows of a long table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, epoch: int, supernet: Supernet) -> None:
        """Add one row for each operation on each edge of each cell kind."""
        for kind, weights in supernet.architecture().items():
            for (source, target), row in zip(EDGES, weights.tolist(), strict=True):
                self.rows += [
                    {
                        "epoch": epoch,
                        "cell": kind,
                        "edge": f"{source}->{target}",
                        "op": op,
                        "weight": weight,
                    }
                    for op, weight in zip(supernet.ops, row, strict=True)
                ]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


class GenotypeWatch:
    """How often, and when last, the operation that an edge prefers has changed.

    Attributes:
        unchanged: looks since the last change.
    """

    def __init__(self) -> None:
        self.preferred: Tensor | None = None
        self.unchanged = 0

    def look(self, supernet: Supernet) -> int:
        """Count the edges, of both cell kinds, whose strongest operation is another than before.

        The first look counts none.
        """
        weights = torch.cat([w.detach() for w in supernet.architecture().values()])
        now = weights.argmax(dim=1).cpu()
        changed = 0 if self.preferred is None else int((now != self.preferred).sum())
        self.unchanged = self.unchanged + 1 if self.preferred is not None and not changed else 0
        self.preferred = now
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {"preferred": self.preferred, "unchanged": self.unchanged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.preferred, self.unchanged = state["preferred"], state["unchanged"]


def decisions(supernet: Supernet) -> dict[str, float]:
    """Count the edges that prefer the skip connection, and the share of decided weights.

    Returns:
        `skip_normal` and `skip_reduce`: edges whose largest w(α) is the skip connection's;
        `decided`: the share of all w(α) that are near 0 or 1, see `DECIDED`.
    """
    architecture = {kind: w.detach() for kind, w in supernet.architecture().items()}
    skip = supernet.ops.index("skip_connect")
    figures: dict[str, float] = {
        f"skip_{kind}": int((architecture[kind].argmax(dim=1) == skip).sum()) for kind in CELL_KINDS
    }
    weights = torch.cat([w.flatten() for w in architecture.values()])
    low, high = DECIDED
    figures["decided"] = float(((weights < low) | (weights > high)).float().mean())
    return figures


@torch.no_grad()
def encode(supernet: Supernet, images: Tensor, normalise: Normalise, batch: int = 256) -> Tensor:
    """Compute the supernet's features, (N, out_features), of images shown as they are.

    Args:
        images: uint8 (N, H, W, C), on the supernet's device.
        batch: the number of images at a time.
    """
    training = supernet.training
    supernet.eval()
    try:
        features = []
        for chunk in images.split(batch):
            with autocast(images.device):
                features.append(supernet.features(normalise(chunk), supernet.architecture()))
        return torch.cat([chunk.float() for chunk in features])
    finally:
        supernet.train(training)


def knn_monitor(train: TrainingImages, val: TrainingImages) -> Callable[[Supernet], float]:
    """Make a function of a supernet: the accuracy of nearest neighbours in its features.

    Each validation image is classified by the training images nearest to it (see
    `ssnas.metrics.knn_accuracy`). It tells how well features that saw no label tell classes apart.

    Args:
        train, val: labelled images, on the supernet's device.
    """
    train_labels, val_labels = train.labels, val.labels
    assert train_labels is not None and val_labels is not None, "k-NN reads labels"

    def monitor(supernet: Supernet) -> float:
        train_features, val_features = (
            encode(supernet, images.pixels, images.normalise) for images in (train, val)
        )
        return knn_accuracy(train_features, train_labels, val_features, val_labels)

    return monitor
