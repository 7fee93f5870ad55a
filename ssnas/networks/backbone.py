"""Stem and cells, common to supernet and derived network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssnas.config.recipes import REDUCED_SIZE
from ssnas.engine.batch_norm import Norm
from ssnas.engine.graph import concatenated
from ssnas.engine.op_group import OpGroup
from ssnas.engine.watch import transformed
from ssnas.errors import InputError
from ssnas.networks.cell import Cell
from ssnas.networks.cell_graph import CellGraph, prepare
from ssnas.networks.space import NUM_NODES, cell_kinds

KERNEL_DIMENSIONS = 4


class CifarStem(nn.Sequential):
    """3×3 convolution and batch norm at full resolution (Liu et al. 2019, CIFAR-10).

    Args:
        in_channels: channels of the images.
        width: channels of the output.
    """

    reduces = False
    stride = 1

    def __init__(self, in_channels: int, width: int) -> None:
        convolution = nn.Conv2d(in_channels, width, 3, self.stride, padding=1, bias=False)
        super().__init__(convolution, Norm(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of the first cell, here one and the same, (N, width, H, W)."""
        (x,), norm = self.before_groups(x), self[-1]
        x = norm(x)
        return x, x

    def before_groups(self, x: Tensor) -> list[Tensor]:
        """Compute the part of the stem that the cells' graph starts from: all but the last norm."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return [x]

    def groups(self) -> list[OpGroup]:
        """The rest as a part of that graph, where a batch norm needs fewer passes over memory."""
        return [OpGroup([self[-1]], (1,), (0,), weighted=False)]


class HalfStem(CifarStem):
    """`CifarStem` with stride 2: the first cell computes on a quarter of the pixels."""

    stride = 2


class QuarterStem(CifarStem):
    """Two 3×3 convolutions of stride 2: the first two of `ImageNetStem`, for images in between.

        s0 = s1 = bn(conv(relu(bn(conv(x)))))

    The first cell computes on a 16th of the pixels. On a CPU that pays for more channels, which
    fill its vectors, and for more epochs.
    """

    stride = 4

    def __init__(self, in_channels: int, width: int) -> None:
        nn.Sequential.__init__(
            self, *_halving(in_channels, width // 2), nn.ReLU(), *_halving(width // 2, width)
        )


class ImageNetStem(nn.Sequential):
    """Three 3×3 convolutions of stride 2 (Liu et al. 2019, ImageNet), for large images:

        s0 = bn(conv(relu(bn(conv(x))))),  s1 = bn(conv(relu(s0)))

    so that the first cell computes on a 64th of the pixels. The first convolution has half of the
    channels. Arguments as of `CifarStem`.
    """

    reduces = True
    stride = 8

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            *_halving(in_channels, width // 2),
            nn.ReLU(),
            *_halving(width // 2, width),
            nn.ReLU(),
            *_halving(width, width),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of the first cell: s0, (N, width, ⌈H/4⌉, ⌈W/4⌉), and s1, half as large."""
        *first, relu, convolution, norm = self
        for layer in first:
            x = layer(x)
        return x, norm(convolution(relu(x)))

    def before_groups(self, x: Tensor) -> list[Tensor]:
        """Compute the part of the stem that the cells' graph starts from: all of it."""
        return list(self(x))

    def groups(self) -> list[OpGroup]:
        """The rest as a part of that graph: nothing."""
        return []


def _halving(in_channels: int, channels: int) -> tuple[nn.Conv2d, Norm]:
    return nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False), Norm(channels)


STEMS: dict[str, type[CifarStem | ImageNetStem]] = {
    "cifar": CifarStem,
    "half": HalfStem,
    "quarter": QuarterStem,
    "imagenet": ImageNetStem,
}


def shape_of(weights: Mapping[str, Tensor], stem_multiplier: int, size: int) -> tuple[str, int]:
    """Tell the stem and the channels C of a network by its weights.

    Args:
        weights: a state dict.
        stem_multiplier: of the network.
        size: of its images in pixels, which decides between two stems of the same weights.

    Example:
        >>> weights = {f"stem.{name}": w for name, w in QuarterStem(3, 12).state_dict().items()}
        >>> shape_of(weights, stem_multiplier=3, size=32)
        ('quarter', 4)
    """
    convolutions = [
        w for name, w in weights.items() if name.startswith("stem.") and w.ndim == KERNEL_DIMENSIONS
    ]
    single = "half" if size >= REDUCED_SIZE else "cifar"
    stem = (single, "quarter", "imagenet")[len(convolutions) - 1]
    return stem, len(convolutions[-1]) // stem_multiplier


class Backbone(nn.Module):
    """Stem and cells: images to pooled features.

    Channels start at `channels` and double at each reduction cell.

    Args:
        ops: for each cell kind, the operations of each edge (see `Cell`).
        channels: C of the first cell.
        num_cells: L.
        in_channels: channels of the images.
        stem_multiplier: the stem has `stem_multiplier` · C channels.
        affine: whether the cells' batch norms have affine parameters.
        partial: K of the cells' partial channel connections.
        stem: a key of `STEMS`.

    Attributes:
        accelerated: whether the engine may compute the cells (`networks.cell_graph`), instead of
            their own `forward`. Where a hook, a tracer or an exporter looks, it never does.
        cell_by_cell: whether cells are computed one after the other, instead of all as one graph.
        out_features: length of the feature vector.
        channels: C of the last cell.
        last_widths: channels of the last two outputs, which a further cell would read.

    Raises:
        InputError: for an unknown stem.
    """

    accelerated = True
    cell_by_cell = False

    def __init__(
        self,
        ops: Mapping[str, Mapping[int, Sequence[str]]],
        channels: int,
        num_cells: int,
        in_channels: int = 3,
        stem_multiplier: int = 3,
        affine: bool = True,
        partial: int = 1,
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise InputError(f"search.stem: unknown {stem!r}; choose from {', '.join(STEMS)}")
        width = stem_multiplier * channels
        self.stem = STEMS[stem](in_channels, width)
        self.kinds = cell_kinds(num_cells)
        cells: list[Cell] = []
        previous, previous_reduce = (width, width), self.stem.reduces
        for kind in self.kinds:
            reduce = kind == "reduce"
            channels *= 2 if reduce else 1
            cell = Cell(ops[kind], previous, channels, reduce, previous_reduce, affine, partial)
            cells.append(prepare(cell))
            previous, previous_reduce = (previous[1], NUM_NODES * channels), reduce
        if partial > 1:
            self.cell_by_cell = True
        self.cells = nn.ModuleList(cells)
        self._graph = CellGraph(self.cells, self.stem.groups())
        self._graphs: dict[Cell, CellGraph] = {}
        self.channels, self.last_widths = channels, previous
        self.out_features = NUM_NODES * channels

    def features(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Globally average-pooled output of the last cell, (N, out_features).

        Args:
            x: images, (N, in_channels, H, W), normalised.
            weights: w(α) of each cell kind, or None.
        """
        nodes = self.outputs(x, weights)[-1]
        return torch.cat([node.mean(dim=(2, 3)) for node in nodes], dim=1)

    def states(
        self, x: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the last cell but one and of the last cell; arguments as of `features`."""
        before_last, last = self.outputs(x, weights)[-2:]
        return concatenated(before_last), concatenated(last)

    def outputs(self, x: Tensor, weights: Mapping[str, Tensor] | None) -> list[Sequence[Tensor]]:
        """Outputs of the stem and of the cells, each in parts whose channels follow each other.

        Cell by cell only the last two, so that no others are kept.
        """
        x = self.arrange(x)
        tables = [None if weights is None else weights[kind] for kind in self.kinds]
        if self.accelerated and not self.cell_by_cell and self._graph.takes(x):
            return self._graph(self.stem.before_groups(x), tables)
        s0, s1 = self.stem(x)
        outputs: list[Sequence[Tensor]] = [[s0], [s1]]
        for cell, table in zip(self.cells, tables, strict=True):
            s0, s1 = s1, self.run_cell(cast(Cell, cell), s0, s1, table)
            outputs = [outputs[-1], [s1]]
        return outputs

    def arrange(self, x: Tensor) -> Tensor:
        """Channels-last, in which depthwise convolution, pooling and batch norm run fastest."""
        # Under vmap PyTorch knows no memory formats.
        return x if transformed() else x.contiguous(memory_format=torch.channels_last)

    def run_cell(self, cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor | None) -> Tensor:
        """The output of one cell, see `Cell.forward`; by the engine where it may compute it."""
        if self.accelerated and not torch.compiler.is_compiling():
            graph = self._graphs.setdefault(cell, CellGraph([cell]))
            if graph.takes(s1):
                return concatenated(graph([s0, s1], [weights])[-1])
        output: Tensor = cell(s0, s1, weights)
        return output
