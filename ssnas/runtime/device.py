"""Device, precision, seeds and the measured cost of a run: the one place that knows the machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from ssnas.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: the accelerator if there is one, else the CPU; or a device by its PyTorch name.

    torchrun numbers the processes of a machine: each takes the accelerator of its own number,
    unless the name has one.

    Raises:
        InputError: for a device that this machine does not have.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if found is None else found.type
    try:
        device = torch.device(name)
        local = os.environ.get("LOCAL_RANK")
        if local is not None and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, int(local))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"device: {name!r} cannot be used here ({reason}); accepted is auto, cpu, or an "
            "accelerator of this machine such as cuda:0"
        ) from error
    return device


def seed_everything(seed: int) -> None:
    """Seed the global generators, which only the initialisation of weights draws from."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def generator(device: torch.device, *seeds: int) -> torch.Generator:
    """A generator of `device` for a stream named by integers, for instance (seed, purpose)."""
    mixed = 0
    for value in seeds:
        mixed = (mixed * 1_000_003 + value + 1) % (2**63)
    return torch.Generator(device=device).manual_seed(mixed)


def constant(values: tuple, like: Tensor) -> Tensor:
    """A tensor of these numbers, nested in tuples, of the dtype and on the device of `like`.

    It is made once and kept: to copy from the host would make an accelerator wait at every step,
    and a captured step reads it where it lies.
    """
    return _constant(values, like.dtype, like.device)


@functools.cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 mixed precision on an accelerator, full precision on the CPU."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def machine(device: torch.device) -> dict[str, str | int]:
    """What a figure of cost was measured on: device, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} (CPU)"
    return f"{platform.processor() or platform.machine()} (CPU)"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
