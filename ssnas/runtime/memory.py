"""How much memory there is, and how much a training would take."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take on a device; None where nothing tells.

    Under Linux a container's limit counts (cgroup v2).

    Example:
        >>> available_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type != "cpu":
        return None
    limits = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        limits.append(int(limit) - int(used))
    if not limits and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def training_memory(
    build: Callable[[], nn.Module], forward: Callable[[nn.Module, Tensor], object], shape: list[int]
) -> int:
    """Estimate the bytes of a training step, without computing or allocating anything.

    They are the weights, their gradients and momenta, and what the forward pass keeps for the
    backward pass, as PyTorch's own operations would in float32.

    Args:
        build: makes the network.
        forward: calls it on images.
        shape: of a batch, (N, C, H, W).

    Example:
        >>> training_memory(lambda: nn.Linear(4, 2), lambda network, x: network(x), [8, 4])
        248
    """
    with torch.device("meta"):
        network = build()
        images = torch.empty(shape)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward(network, images)
    # One storage may be kept several times.
    activations = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    weights = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    del result
    return sum(activations.values()) + 3 * weights
