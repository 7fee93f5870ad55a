"""Each training step's inputs, drawn ahead in blocks of several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssnas.config.schema import Training
from ssnas.data.sampling import draw_batches
from ssnas.runtime.device import generator
from ssnas.runtime.distributed import shard
from ssnas.training.images import TrainingImages
from ssnas.training.objectives import Objective

BLOCK_PIXELS = 2**20


class BatchStream:
    """The batches of every epoch, and for every step the inputs that its objective draws.

    A view is many small kernels, and as many for one image as for thousands: an accelerator gets
    through them once a block of several steps. The size of a block follows from that of batches and
    images alone, and every block has a random stream of its own, so a training that goes on in the
    middle of a block draws the same again.

    Args:
        objective: draws the inputs.
        images: to draw from.
        config: the sampling scheme and the batch size.
        order: names the random stream (see `ssnas.runtime.device.generator`) that orders the
            images; its state is the state of this object.
        views: names the random stream that the objective draws its inputs from.
        subsets: disjoint sets of indices, of which each step sees one batch each; one set of all
            images by default. A batch is at most the last set.
    """

    def __init__(
        self,
        objective: Objective,
        images: TrainingImages,
        config: Training,
        order: tuple[int, ...],
        views: tuple[int, ...],
        subsets: Sequence[Tensor] | None = None,
    ) -> None:
        self.objective, self.images = objective, images
        self.subsets = [torch.arange(len(images.pixels))] if subsets is None else list(subsets)
        self.sampling = config.sampling
        self.batch_size = min(config.batch_size, len(self.subsets[-1]))
        self.order, self.views = generator(torch.device("cpu"), *order), views
        self._labels = None if images.labels is None else images.labels.cpu()
        self._epoch: int | None = None
        self._block: int | None = None

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return len(self.subsets[-1]) // self.batch_size

    def draw_epoch(self) -> Tensor:
        """Draw the indices of the next epoch, (steps, batch, subsets, samplers), on the CPU."""
        return draw_batches(self.subsets, self.sampling, self.batch_size, self.order, self._labels)

    def inputs(self, batches: Tensor, epoch: int, step: int) -> list[tuple[Tensor, ...]]:
        """Give the objective's inputs for one step, one tuple for each subset.

        Args:
            batches: of the epoch, from `draw_epoch`.
            epoch: its number, from 0.
            step: its number in the epoch, from 0.
        """
        if epoch != self._epoch:
            # One copy from the host an epoch, since each makes an accelerator wait.
            self._indices = batches.to(self.images.pixels.device)
            self._epoch, self._block = epoch, None
        pixels = batches[0].numel() * self.images.pixels[0, ..., 0].numel()
        steps = max(1, BLOCK_PIXELS // pixels)
        block, position = divmod(step, steps)
        if block != self._block:
            indices = self._indices[block * steps :][:steps]
            random = generator(indices.device, *self.views, epoch, block)
            self._inputs = self._draw(indices, random)
            self._block = block
        return [
            tuple(tensor[position, subset] for tensor in self._inputs)
            for subset in range(batches.shape[2])
        ]

    def _draw(self, indices: Tensor, random: torch.Generator) -> list[Tensor]:
        """Draw each of the objective's tensors for a block, (steps, subsets, batch, …).

        Every process draws for whole batches, so that the number of processes changes nothing, and
        keeps its own rows.
        """
        by_subset = indices.transpose(1, 2)
        drawn = self.objective.draw(self.images, by_subset.flatten(0, 2), random)
        self.images.release()
        blocks = [tensor.unflatten(0, by_subset.shape[:3]) for tensor in drawn]
        return [shard(tensor.movedim(2, 0)).movedim(0, 2) for tensor in blocks]

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.order.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.set_state(state["state"])
