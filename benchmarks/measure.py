"""What the benchmarks share: the setting, the machine, times, memory, kernels and files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

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


@dataclass(frozen=True)
class Setting:
    """The size of a step, how it is computed, and on what.

    Args:
        channels: C of the first cell.
        cells: L.
        batch: images of one batch.
        size: height and width of the images.
        amp: `bf16` for mixed precision, or `off`.
        graphs: whether CUDA graphs replay the steps, `on` or `off`.
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
        """What two reports must share to be compared; the machine is recorded apart."""
        keys = ("channels", "cells", "batch", "size", "amp", "graphs")
        return {key: getattr(self, key) for key in keys}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `setting_of` reads, and `--repeats`."""
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=7)
    add_machine(parser)
    parser.add_argument("--amp", choices=PRECISIONS, default="off", help="of the fast system")
    parser.add_argument("--graphs", choices=SWITCH, help="CUDA graphs; on wherever there is CUDA")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """`--threads` and `--device`."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that the options describe; sets the number of threads and the allocator.

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
    """Use so many threads, and the allocator as the stages do; once in each process that measures.

    PyTorch's own functions gain from the allocator too, so every system is measured with it.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()


def environment(setting: Setting) -> dict[str, Any]:
    """What was measured on what: device, host, versions and commit.

    `compiled_kernels` says whether the CPU had those of `ssnas.engine.cpu.library`.
    """
    return {
        **machine(torch.device(setting.device)),
        "host": machine(torch.device("cpu"))["device"],
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if setting.on_cuda else None,
        "compiled_kernels": not setting.on_cuda and kernels.library() is not None,
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    """What git prints, or None outside a repository or before its first commit."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def interleaved(
    steps: Mapping[str, Step], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each repeat; the systems take turns, so that all meet the same noise."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-warm_up(device), repeats):
        for name, step in steps.items():
            taken = seconds_of(step, device)
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def warm_up(device: torch.device) -> int:
    """Steps until nothing is done for the first time; on CUDA the last but one records a graph."""
    return capture.WARM_UP + 2 if device.type == "cuda" else 2


def seconds_of(step: Step, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(seconds: list[float], batch: int, peak: float | None) -> dict[str, float | None]:
    """The figures of one system; images per second are those of one batch per median step."""
    return {
        "median_ms": 1e3 * median(seconds),
        "min_ms": 1e3 * min(seconds),
        "images_per_second": batch / median(seconds),
        "peak_mb": peak,
    }


def peak_megabytes(make: Callable[[], Step], setting: Setting) -> float | None:
    """Memory that a few steps need at their peak, in 10⁶ bytes; call it in a fresh process.

    On a CPU it is the growth of the process beyond imports and model; on CUDA it is what the
    allocator handed out at most, the model included, and None where that was not enough.
    """
    use_machine(setting.threads)
    try:
        step = make()
        before = _resident_bytes()
        for _ in range(warm_up(torch.device(setting.device))):
            step()
    except torch.OutOfMemoryError:
        return None
    if setting.on_cuda:
        return torch.cuda.max_memory_allocated(setting.device) / 1e6
    return (_resident_bytes() - before) / 1e6


def _resident_bytes() -> int:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # Unlike ru_maxrss, which a new process inherits from the one that starts it.
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if own:
        return own[0] * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@dataclass
class Total:
    """How often something ran, and for how many seconds in all."""

    calls: int = 0
    seconds: float = 0.0

    def add(self, calls: int, seconds: float) -> None:
        self.calls += calls
        self.seconds += seconds


def on_cuda(step: Step, device: torch.device, steps: int) -> tuple[dict[str, Total], ...]:
    """What PyTorch's profiler saw on the device in `steps` steps, by kernel and by operator.

    Copies and fills count as kernels. An operator has the time of the kernels that it launched
    itself; those that a CUDA graph replays belong to none.
    """
    step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    return totals(profiler.events())


def totals(events) -> tuple[dict[str, Total], dict[str, Total]]:
    """By kernel and by operator, from the profiler's events."""
    by_kernel: dict[str, Total] = {}
    by_operator: dict[str, Total] = {}
    for event in events:
        # Annotations of the device's time line span kernels that are listed themselves.
        if event.is_user_annotation:
            continue
        found = by_operator if event.device_type == DeviceType.CPU else by_kernel
        if event.self_device_time_total > 0:
            total = found.setdefault(event.name, Total())
            total.add(1, event.self_device_time_total / 1e6)
    return by_kernel, by_operator


def kernel_figures(step: Step, device: torch.device, median_ms: float) -> dict[str, float]:
    """Kernels of one step, and the share of its undisturbed time in which they run."""
    steps = 3
    by_kernel, _by_operator = on_cuda(step, device, steps)
    busy = sum(total.seconds for total in by_kernel.values()) / steps
    return {
        "kernels": sum(total.calls for total in by_kernel.values()) / steps,
        "kernel_share": 1e3 * busy / median_ms,
    }


def report(kind: str, setting: Setting, repeats: int, **more: Any) -> dict[str, Any]:
    """What every JSON file begins with."""
    return {
        "benchmark": kind,
        "environment": environment(setting),
        "settings": setting.recorded(),
        "repeats": repeats,
        **more,
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")


def resized(setting: Setting, **sizes: int) -> Setting:
    return dataclasses.replace(setting, **sizes)


def run_or_refuse(main: Callable[[], int]) -> int:
    """The exit status of `main`, or 2 with a message for input that it refuses."""
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
