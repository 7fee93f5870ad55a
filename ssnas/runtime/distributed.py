"""Several processes as one: each takes a part of every batch; gradients are averaged.

Without a process group every function returns its input unchanged. What couples the samples of a
batch, a loss (`gather`) or batch norm (`ssnas.engine.batch_norm`), sees the parts of all processes,
so that W processes compute what one would with the same batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssnas.errors import InputError


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group that `torchrun` started this process for, if it did.

    On an accelerator with an index `device` becomes the current one, since objects are sent there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        device_id=None if device.index is None else device,
    )
    try:
        yield
        # A process that leaves early would cut off those that still talk.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def agreed(decision: bool) -> bool:
    """The first process's decision, in all of them: one that goes on alone would wait for ever."""
    if not active():
        return decision
    decisions = [decision]
    dist.broadcast_object_list(decisions, src=0)
    return decisions[0]


def shard(batch: Tensor) -> Tensor:
    """This process's part of a batch (N, …): every W-th row of W processes.

    Raises:
        InputError: if W does not divide N.
    """
    if not active():
        return batch
    world = dist.get_world_size()
    if len(batch) % world:
        raise InputError(
            f"batch_size: found {len(batch)} with {world} processes; accepted is a multiple of "
            f"{world}"
        )
    return batch[rank() :: world]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, (N, …) to (W N, …), in the batch's order: `shard` undone.

    A loss that couples the samples of a batch is computed on the whole batch by every process.
    Gradients flow to the rows of all of them: each row gets its own W times, and
    `average_gradients` divides by W.
    """
    return _Gather.apply(x.contiguous()) if active() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return shard(gradient)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, with one exchange for all of them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not active() or not gradients:
        return
    joint = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joint)
    joint /= dist.get_world_size()
    for gradient, mean in zip(gradients, joint.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
