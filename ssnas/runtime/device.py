"""The machine: its device, its precision, random streams, and what a run costs on it."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssnas.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """Choose the device to compute on.

    torchrun numbers the processes of a machine in `LOCAL_RANK`: each process takes the accelerator
    of its number, unless `name` has one.

    Args:
        name: `auto` for the accelerator if there is one, else the CPU; or a PyTorch device name.

    Raises:
        InputError: for a device that this machine does not have.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank is not None and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, int(local_rank))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"device: {name!r} cannot be used here ({reason}); accepted is auto, cpu, or an "
            "accelerator of this machine such as cuda:0"
        ) from error
    return device


def seed_everything(seed: int) -> None:
    """Seed PyTorch's global generators, and let cuDNN choose deterministic kernels.

    Only the initialisation of weights draws from the global generators. Everything else draws from
    streams of its own, see `generator`.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def generator(device: torch.device, *stream: int) -> torch.Generator:
    """Start the random stream that is named by integers, for instance (seed, purpose, epoch).

    The same name gives the same numbers; two names give independent ones.

    Example:
        >>> cpu = torch.device("cpu")
        >>> first, again, other = (generator(cpu, 0, purpose) for purpose in (1, 1, 2))
        >>> numbers = torch.rand(3, generator=first)
        >>> torch.equal(numbers, torch.rand(3, generator=again))
        True
        >>> torch.equal(numbers, torch.rand(3, generator=other))
        False
    """
    mixed = 0
    for part in stream:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator(device=device).manual_seed(mixed)


def constant(values: tuple[Any, ...], like: Tensor) -> Tensor:
    """Give a tensor of these numbers, of the dtype and on the device of `like`.

    The tensor is made once and kept, so nobody may change it. Copying numbers from the host would
    make an accelerator wait at every step, and a recorded step needs them at a fixed address.

    Args:
        values: numbers, or equally long tuples of them for more dimensions.

    Example:
        >>> constant((0.5, 2.0), like=torch.zeros(3))
        tensor([0.5000, 2.0000])
    """
    # While a network is traced or exported, tensors are symbols that nobody else may be given.
    make = _constant if type(like) is Tensor and not torch.compiler.is_compiling() else _make
    return make(values, like.dtype, like.device)


def _make(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


_constant = functools.cache(_make)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute in bfloat16 mixed precision on an accelerator, in full precision on the CPU.

    `mixed_precision` decides otherwise.
    """
    mixed = _mixed.get()
    if mixed is None:
        mixed = device.type != "cpu"
    if not mixed:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


_mixed: ContextVar[bool | None] = ContextVar("mixed", default=None)


@contextlib.contextmanager
def mixed_precision(enabled: bool) -> Iterator[None]:
    """Let `autocast` mix precisions on every device within the context, or on none.

    Example:
        >>> with mixed_precision(True), autocast(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    token = _mixed.set(enabled)
    try:
        yield
    finally:
        _mixed.reset(token)


def machine(device: torch.device) -> dict[str, str | int]:
    """Name the device, the number of CPU threads, and the versions of PyTorch and Python."""
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


def peak_memory_mb(device: torch.device) -> int | None:
    """Peak memory in MiB since the process started: of a CUDA device, else of the process.

    It is None for a CPU under Windows, which does not tell.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
