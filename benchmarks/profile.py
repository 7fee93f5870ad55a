"""Where the time of a search step and of a fine-tuning step of the fast system goes.

    python -m benchmarks.profile --threads 2 --out benchmarks/results/mine-profile.txt

On a CPU every operator is timed as it is called; on CUDA PyTorch's profiler says which operators
and which kernels the time on the device belongs to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.measure import Setting, Step, Total
from benchmarks.systems import STEPS, System, make_step, replaced, systems_for
from ssnas.engine.cpu.lowering import Shape
from ssnas.engine.cpu.tape import Program

ROWS = 25
CONVOLUTIONS = ("convolution", "convolution_backward")


class OperatorTimes(TorchDispatchMode):
    """Times every operator that PyTorch dispatches within the context, by `name_of`."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, Total] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.timed(name_of(operator, args), operator, *args, **(kwargs or {}))

    def timed(self, name: str, function: Callable, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.totals.setdefault(name, Total()).add(1, time.perf_counter() - start)
        return result

    def timed_run(self, run: Callable) -> Callable:
        """`Program.run`, timed: PyTorch does not dispatch the project's compiled kernels."""

        def timed(program: Program, *tensors: Tensor | None) -> None:
            seconds: list[float] = []
            run(program, *tensors, seconds=seconds)
            for call, taken in zip(program.calls, seconds, strict=True):
                words = [f"compiled {call.kernel}"]
                for shape in _shapes(call.arguments):
                    words.append(f"{shape.kernel}×{shape.kernel}")
                    words += _kinds(shape.stride, shape.dilation)
                self.totals.setdefault(" ".join(words), Total()).add(1, taken)

        return timed


def _shapes(arguments: Sequence[Any]) -> Iterator[Shape]:
    """Those among the arguments of a kernel."""
    for argument in arguments:
        if isinstance(argument, Shape):
            yield argument
        elif isinstance(argument, tuple):
            yield from _shapes(argument)


def name_of(operator: Any, args: Sequence[Any]) -> str:
    """The operator's name; a convolution's also tells its kernel, kind, stride and dilation."""
    name = operator.overloadpacket.__name__
    if name not in CONVOLUTIONS:
        return name
    backward = name == "convolution_backward"
    weight: Tensor = args[2 if backward else 1]
    first = 4 if backward else 3
    stride, dilation, groups = args[first], args[first + 2], args[first + 5]
    words = [name, "×".join(map(str, weight.shape[2:]))]
    if groups > 1:
        words.append("depthwise" if weight.shape[1] == 1 else "grouped")
    words += _kinds(stride[0], dilation[0])
    if backward:
        words.append(
            "of " + " and ".join(f for f, on in zip("xw", args[-1][:2], strict=True) if on)
        )
    return " ".join(words)


def _kinds(stride: int, dilation: int) -> list[str]:
    named = {"stride": stride, "dilation": dilation}
    return [f"{name} {value}" for name, value in named.items() if value > 1]


def on_cpu(step: Step, device: torch.device, repeats: int) -> str:
    """The table of operators, with the wall time of the steps that it was taken from."""
    undisturbed = median(measure.interleaved({"step": step}, device, repeats)["step"])
    times = OperatorTimes()
    with times, replaced(Program, "run", times.timed_run(Program.run)):
        wall = sum(measure.seconds_of(step, device) for _ in range(repeats)) / repeats
    busy = sum(total.seconds for total in times.totals.values()) / repeats
    return (
        f"{1e3 * undisturbed:.1f} ms a step undisturbed, {1e3 * wall:.1f} ms while it was timed, "
        f"of which {1e3 * busy:.1f} ms in operators\n\n" + table(times.totals, repeats)
    )


def on_cuda(step: Step, plain_launches: Step, device: torch.device, repeats: int) -> str:
    """The tables of kernels and, from a step without CUDA graphs, of operators."""
    undisturbed = median(measure.interleaved({"step": step}, device, repeats)["step"])
    by_kernel, _none = measure.on_cuda(step, device, repeats)
    _kernels, operators = measure.on_cuda(plain_launches, device, repeats)
    busy = sum(total.seconds for total in by_kernel.values()) / repeats
    return (
        f"{1e3 * undisturbed:.2f} ms a step, of which {1e3 * busy:.2f} ms in kernels\n\n"
        f"Kernels\n\n{table(by_kernel, repeats)}\n"
        f"Operators, without CUDA graphs\n\n{table(operators, repeats)}"
    )


def table(totals: dict[str, Total], steps: int) -> str:
    """Time, share and calls of each, for one step, the longest first; the rest in one row."""
    ordered = sorted(totals.items(), key=lambda item: -item[1].seconds)
    whole = sum(total.seconds for total in totals.values()) or 1.0
    lines = [f"{'ms':>10}{'share':>8}{'calls':>9}  name"]
    for name, total in ordered[:ROWS]:
        lines.append(_row(name, [total], steps, whole))
    if len(ordered) > ROWS:
        lines.append(
            _row(f"{len(ordered) - ROWS} others", [t for _, t in ordered[ROWS:]], steps, whole)
        )
    return "\n".join(lines) + "\n"


def _row(name: str, totals: Sequence[Total], steps: int, whole: float) -> str:
    seconds, calls = sum(t.seconds for t in totals), sum(t.calls for t in totals)
    cut = name if len(name) <= 90 else name[:89] + "…"
    return f"{1e3 * seconds / steps:10.3f}{seconds / whole:8.1%}{calls / steps:9.1f}  {cut}"


def profile(what: str, setting: Setting, repeats: int) -> str:
    device, system = torch.device(setting.device), systems_for(setting)["fast"]
    step = make_step(what, system, setting)
    if not setting.on_cuda:
        return on_cpu(step, device, repeats)
    launching = make_step(what, System(amp=system.amp), setting)
    return on_cuda(step, launching, device, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measure.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="text file")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    about = {**measure.environment(setting), **setting.recorded()}
    text = "\n".join(f"{key}: {value}" for key, value in about.items()) + "\n"
    for what in STEPS:
        text += f"\n{what} step: {profile(what, setting, args.repeats)}"
    print(text)
    measure.write_text(args.out, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
