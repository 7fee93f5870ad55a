"""The setting, the machine, times, memory and kernels of a measured step."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssnas.engine.cpu import library as kernels
from ssnas.errors import InputError
from ssnas.runtime import cuda_graph as capture
from ssnas.runtime.allocator import keep_freed_memory
from ssnas.runtime.device import choose_device, machine

SWITCH = ("off", "on")
PRECISIONS = ("off", "bf16")

Step = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The size of a step, how it is computed, and on what.

    Args:
        channels: C of the first cell.
        cells: L.
        batch: images of one batch.
        size: height and width of the images.
        amp: `bf16` for mixed precision, or `off`.
        graphs: `on` if CUDA graphs replay the steps, or `off`.
        threads: of the CPU.
        device: PyTorch's name of it.
    """

    channels: int
    cells: int
    batch: int
    size: int
    amp: str
    graphs: str
    threads: int
    device: str

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def recorded(self) -> dict[str, int | str]:
        """Return all but the machine, which is recorded apart."""
        keys = ("channels", "cells", "batch", "size", "amp", "graphs")
        return {key: getattr(self, key) for key in keys}


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark, with `--threads` and `--device`."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return made


def add_sizes(parser: argparse.ArgumentParser, size: int = 32, repeats: int = 7) -> None:
    """Add the other options that `setting_of` reads, and `--repeats`."""
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=size, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--amp", choices=PRECISIONS, default="off", help="of the fast system")
    parser.add_argument("--graphs", choices=SWITCH, help="CUDA graphs; on wherever there is CUDA")


def setting_of(args: argparse.Namespace) -> Setting:
    """Make the setting that the options describe, and prepare this process for it.

    Raises:
        InputError: for a device that this machine lacks, or CUDA graphs elsewhere than on CUDA.
    """
    device = choose_device(args.device)
    graphs = args.graphs or SWITCH[device.type == "cuda"]
    if graphs == "on" and device.type != "cuda":
        raise InputError(f"--graphs: found 'on' with device {device}; accepted is off, or CUDA")
    use_machine(args.threads)
    sizes = (args.channels, args.cells, args.batch, args.size)
    return Setting(*sizes, args.amp, graphs, args.threads, str(device))


def use_machine(threads: int) -> None:
    """Prepare a process that measures: its threads, and the allocator as the stages have it.

    PyTorch's own functions gain from the allocator too, so every system is measured with it.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()


def report(kind: str, setting: Setting, repeats: int, **more: Any) -> dict[str, Any]:
    """Begin a JSON file: what was measured, at which sizes, and on which machine."""
    return {
        "benchmark": kind,
        "environment": environment(setting),
        "settings": setting.recorded(),
        "repeats": repeats,
        **more,
    }


def environment(setting: Setting) -> dict[str, Any]:
    """Record device, host, versions and commit.

    `compiled_kernels` is true where the CPU had those of `ssnas.engine.cpu.library`.
    """
    return {
        **machine(torch.device(setting.device)),
        "host": machine(torch.device("cpu"))["device"],
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if setting.on_cuda else None,
        "compiled_kernels": not setting.on_cuda and kernels.library() is not None,
        "commit": git("rev-parse", "--verify", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def git(*arguments: str) -> str | None:
    """Ask git; None outside a repository or before its first commit."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def interleaved(
    steps: Mapping[str, Step], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Time each repeat in seconds; the systems take turns, so that all meet the same noise."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-warm_up(device), repeats):
        for name, step in steps.items():
            taken = seconds_of(step, device)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def warm_up(device: torch.device) -> int:
    """Count the steps that do something for the first time, as recording a graph on CUDA."""
    return capture.WARM_UP + 2 if device.type == "cuda" else 2


def seconds_of(step: Step, device: torch.device) -> float:
    """Time one step."""
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(seconds: list[float], batch: int, peak: float) -> dict[str, float]:
    """Sum up one system; images per second are those of one batch per median step.

    >>> figures([0.25, 0.5, 1.0], batch=32, peak=100.0)
    {'median_ms': 500.0, 'min_ms': 250.0, 'images_per_second': 64.0, 'peak_mb': 100.0}
    """
    return {
        "median_ms": 1e3 * median(seconds),
        "min_ms": 1e3 * min(seconds),
        "images_per_second": batch / median(seconds),
        "peak_mb": peak,
    }


def peak_megabytes(make: Callable[[], Step], setting: Setting) -> float | None:
    """Measure the memory of a few steps at their peak, in 10⁶ bytes; call it in a fresh process.

    On a CPU it is the growth of the process beyond imports and model; on CUDA it is what the
    allocator handed out at most, the model included, and None where that was not enough.
    """
    use_machine(setting.threads)
    try:
        step = make()
        start = _resident_bytes()
        for _ in range(warm_up(torch.device(setting.device))):
            step()
    except torch.OutOfMemoryError:
        return None
    if setting.on_cuda:
        return torch.cuda.max_memory_allocated(setting.device) / 1e6
    return (_resident_bytes() - start) / 1e6


def _resident_bytes() -> int:
    """Return the most memory that this process ever held."""
    # Unlike ru_maxrss, which a new process inherits from the one that starts it.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process, which starts small and without what others left."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Timed(NamedTuple):
    """One run of a kernel or an operator."""

    name: str
    seconds: float


def on_cuda(step: Step, device: torch.device, steps: int) -> tuple[list[Timed], list[Timed]]:
    """Profile `steps` steps with PyTorch: what ran on the device, by kernel and by operator."""
    step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    return runs_of(profiler.events() or ())


def runs_of(events: Iterable[Any]) -> tuple[list[Timed], list[Timed]]:
    """Split the profiler's events into the runs of kernels and those of operators.

    Copies and fills count as kernels. An operator has the time of the kernels that it launched
    itself; those that a CUDA graph replays belong to none.
    """
    by_kernel: list[Timed] = []
    by_operator: list[Timed] = []
    for event in events:
        # Annotations of the device's time line span kernels that are listed themselves.
        if event.self_device_time_total > 0 and not event.is_user_annotation:
            runs = by_operator if event.device_type == DeviceType.CPU else by_kernel
            runs.append(Timed(event.name, event.self_device_time_total / 1e6))
    return by_kernel, by_operator


def kernel_figures(step: Step, device: torch.device, median_ms: float) -> dict[str, float]:
    """Count the kernels of one step, and the share of its undisturbed time in which they run."""
    steps = 3
    kernels_run, _operators = on_cuda(step, device, steps)
    busy = sum(run.seconds for run in kernels_run) / steps
    return {"kernels": len(kernels_run) / steps, "kernel_share": 1e3 * busy / median_ms}


def run_or_refuse(main: Callable[[], int]) -> int:
    """Return the exit status of `main`, or 2 with a message for input that it refuses."""
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
