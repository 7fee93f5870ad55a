"""The discrete network of a genotype, and the inheritance of the supernet's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ssnas.errors import InputError
from ssnas.networks.backbone import Backbone
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.space import CELL_KINDS, EDGES


class DerivedNetwork(Backbone):
    """Stem, cells of the genotype's operations, global average pooling, linear classifier.

    Args:
        genotype: the operations to keep.
        channels: C of the first cell; it doubles at each reduction cell.
        num_cells: L.
        num_classes: outputs of the classifier (labels, when multi-label).
        in_channels: channels of the images.
        stem_multiplier: the stem has `stem_multiplier` · C channels.
        stem: see `backbone.STEMS`.

    Raises:
        InputError: for an unknown stem.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int,
        num_cells: int,
        num_classes: int,
        in_channels: int = 3,
        stem_multiplier: int = 3,
        stem: str = "cifar",
    ) -> None:
        super().__init__(
            {kind: _ops_by_edge(getattr(genotype, kind)) for kind in CELL_KINDS},
            channels,
            num_cells,
            in_channels,
            stem_multiplier,
            stem=stem,
        )
        self.genotype = genotype
        self.classifier = nn.Linear(self.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.classifier(self.features(x))


Network = DerivedNetwork
"""Its public name, `ssnas.Network`."""


def _ops_by_edge(edges: Iterable[Edge]) -> dict[int, list[str]]:
    ops: dict[int, list[str]] = {}
    for source, target, op in edges:
        ops.setdefault(EDGES.index((source, target)), []).append(op)
    return ops


def inherit(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give `network` the weights of the supernet, or of a network of the same genotype (T21).

    Stem, preprocessing and the chosen operations are taken over with their batch-norm statistics;
    affine batch-norm parameters, which a supernet lacks, start as the identity. The classifier
    stays as it is. A first convolution with another number of input channels shares the sum of its
    kernels over the old input channels equally among the new ones, so that a grey image, shown on
    all channels, excites it as before.

    Args:
        weights: the state dict to take from.

    Raises:
        InputError: if a tensor that the network needs is missing or has another shape.

    Example:
        >>> from ssnas.networks.supernet import Supernet
        >>> supernet = Supernet(4, 3)
        >>> skips = tuple(Edge(0, node, "skip_connect") for node in range(2, 6))
        >>> network = DerivedNetwork(Genotype(skips, skips), 4, 3, num_classes=2)
        >>> inherit(network, supernet.state_dict())
        >>> torch.equal(network.stem[0].weight, supernet.stem[0].weight)
        True
    """
    for name, target in network.state_dict().items():
        if name.startswith(("classifier.", "classifiers.")):
            continue
        if name not in weights:
            norm = name.removesuffix(".bias").removesuffix(".weight")
            if _is_affine(name) and f"{norm}.running_mean" in weights:
                continue
            raise InputError(
                f"inherit: the search's weights have no {name!r}; derive the genotype from the "
                "same search, or train from scratch (finetune.inherit false, transfer.weights none)"
            )
        searched = weights[name]
        if name == "stem.0.weight" and searched.shape[1] != target.shape[1]:
            searched = searched.mean(dim=1, keepdim=True) * (searched.shape[1] / target.shape[1])
            searched = searched.expand_as(target)
        if searched.shape != target.shape:
            raise InputError(
                f"inherit: {name!r} has shape {tuple(searched.shape)} in the search and "
                f"{tuple(target.shape)} in the network; accepted are the same channels and cells, "
                "and search.partial 1; or train from scratch (finetune.inherit false, "
                "transfer.weights none)"
            )
        target.copy_(searched)


def _is_affine(name: str) -> bool:
    return name.endswith((".norm.weight", ".norm.bias"))


def parameter_count(module: nn.Module) -> int:
    """Count the trainable parameters.

    Example:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Count the multiply-adds of the convolutions and linear layers that one image passes.

    Args:
        module: a network; a copy of it is run, in evaluation mode.
        x: images, (N, C, H, W), of which the first is used.

    Example:
        >>> multiply_adds(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 4, 4))
        3456
    """
    total = 0

    def count(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += cast(Tensor, layer.weight)[0].numel() * output[0].numel()

    twin = copy.deepcopy(module).eval()
    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    twin(x[:1])
    return total
