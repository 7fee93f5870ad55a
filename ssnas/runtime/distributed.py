"""Several processes as one: each takes a part of every batch, and gradients are averaged.

Two things couple the samples of a batch: a loss (see `gather`) and batch norm (see
`ssnas.engine.batch_norm`). Both see the rows of all processes, so that W processes compute what one
would compute with the same batch. Without a process group every function returns its input.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssnas.errors import InputError


def active() -> bool:
    """Tell if this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process in its group, from 0; 0 without a group."""
    return dist.get_rank() if active() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group that `torchrun` started this process for; without one do nothing.

    Args:
        device: of this process. An accelerator with an index becomes the current one, since
            PyTorch sends objects from there.
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
    """Give the first process's decision to all: one that goes on alone would wait for ever.

    Example:
        >>> agreed(True)
        True
    """
    if not active():
        return decision
    decisions = [decision]
    dist.broadcast_object_list(decisions, src=0)
    return decisions[0]


def shard(batch: Tensor) -> Tensor:
    """Take this process's rows of a batch (N, …): every W-th row of W processes.

    Raises:
        InputError: if W does not divide N.

    Example:
        >>> shard(torch.arange(4))
        tensor([0, 1, 2, 3])
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
    """Join the rows of all processes, (N, …) to (W N, …), in the batch's order: `shard` undone.

    Every process then computes a loss that couples the samples on the whole batch. Gradients flow
    to the rows of all processes: each row gets its gradient W times, and `average_gradients`
    divides by W.

    Example:
        Without a process group there are no other rows:

        >>> gather(torch.arange(2))
        tensor([0, 1])
    """
    return _Gather.apply(x.contiguous()) if active() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.stack(rows, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
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
