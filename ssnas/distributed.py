"""Several processes as one: each takes a part of every batch; gradients are averaged.

Without a process group every function returns its input unchanged. Batch norm uses each process's
own part of the batch.
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
    """The process group that `torchrun` started this process for, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
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
    """The rows of all processes, (N, D) to (W N, D), with gradients to all of them.

    A loss that couples the samples of a batch is computed on the whole batch by every process.
    Its gradient reaches each process W times, and `average_gradients` divides by W.
    """
    if not active():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes."""
    if not active():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
