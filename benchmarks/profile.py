"""Time of a search step and of a fine-tuning step of the fast system, by operator and kernel.

    python -m benchmarks.profile --threads 2 --out benchmarks/results/mine-profile.txt

On a CPU every operator is timed as it is called; on CUDA PyTorch's profiler says which operators
and which kernels the time on the device belongs to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure
from benchmarks.measure import Setting, Step, Timed
from benchmarks.systems import STEPS, System, make_step, systems_for
from ssnas.engine.cpu.lowering import Shape
from ssnas.engine.cpu.tape import Tape
from ssnas.pipeline.artifacts import write_text

ROWS = 25
CONVOLUTIONS = ("convolution", "convolution_backward")


class OperatorTimes(TorchDispatchMode):
    """Times every operator that PyTorch dispatches within the context, and every compiled kernel.

    PyTorch does not dispatch the kernels of the project, which a `Tape` times itself.

    Attributes:
        runs: the operators by `name_of`, and the kernels, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Timed] = []

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        start = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        self.runs.append(Timed(name_of(operator, args), time.perf_counter() - start))
        return result

    def add_kernels(self, tape: Tape, seconds: list[float]) -> None:
        """Add the times of compiled kernels, as `Tape.observer`."""
        for call, taken in zip(tape.calls, seconds, strict=True):
            words = [f"compiled {call.kernel}"]
            for shape in _shapes(call.arguments):
                words.append(f"{shape.kernel}×{shape.kernel}")
                words += _unless_one(stride=shape.stride, dilation=shape.dilation)
            self.runs.append(Timed(" ".join(words), taken))


def _shapes(arguments: Sequence[Any]) -> Iterator[Shape]:
    """List the shapes of convolutions among the arguments of a kernel."""
    for argument in arguments:
        if isinstance(argument, Shape):
            yield argument
        elif isinstance(argument, tuple):
            yield from _shapes(argument)


def name_of(operator: Any, args: Sequence[Any]) -> str:
    """Name an operator; a convolution's name tells its kernel, kind, stride and dilation."""
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
    words += _unless_one(stride=stride[0], dilation=dilation[0])
    if backward:
        wanted = [letter for letter, on in zip("xw", args[-1][:2], strict=True) if on]
        words.append("of " + " and ".join(wanted))
    return " ".join(words)


def _unless_one(**values: int) -> list[str]:
    return [f"{name} {value}" for name, value in values.items() if value > 1]


def on_cpu(step: Step, device: torch.device, repeats: int) -> str:
    """Tabulate the operators, with the wall time of the steps in which they were timed."""
    undisturbed = median(measure.interleaved({"step": step}, device, repeats)["step"])
    times = OperatorTimes()
    # A function: as a class attribute it gets the tape itself.
    Tape.observer = lambda tape, seconds: times.add_kernels(tape, seconds)
    try:
        with times:
            wall = sum(measure.seconds_of(step, device) for _ in range(repeats)) / repeats
    finally:
        Tape.observer = None
    busy = sum(run.seconds for run in times.runs) / repeats
    return (
        f"{1e3 * undisturbed:.1f} ms a step undisturbed, {1e3 * wall:.1f} ms while it was timed, "
        f"of which {1e3 * busy:.1f} ms in operators\n\n" + table(times.runs, repeats)
    )


def on_cuda(step: Step, without_graphs: Step, device: torch.device, repeats: int) -> str:
    """Tabulate the kernels and, from a step without CUDA graphs, the operators."""
    undisturbed = median(measure.interleaved({"step": step}, device, repeats)["step"])
    kernels, _none = measure.on_cuda(step, device, repeats)
    _kernels, operators = measure.on_cuda(without_graphs, device, repeats)
    busy = sum(run.seconds for run in kernels) / repeats
    return (
        f"{1e3 * undisturbed:.2f} ms a step, of which {1e3 * busy:.2f} ms in kernels\n\n"
        f"Kernels\n\n{table(kernels, repeats)}\n"
        f"Operators, without CUDA graphs\n\n{table(operators, repeats)}"
    )


def table(runs: Sequence[Timed], steps: int) -> str:
    """Write time, share and calls of each name for one step, the longest first.

    >>> print(table([Timed("short", 0.001), Timed("long", 0.003)], steps=1), end="")
            ms   share    calls  name
         3.000   75.0%      1.0  long
         1.000   25.0%      1.0  short
    """
    seconds = pd.DataFrame(runs, columns=list(Timed._fields)).groupby("name")["seconds"]
    totals = seconds.agg(["sum", "count"]).sort_values("sum", ascending=False, kind="stable")
    if len(totals) > ROWS:
        rest = totals[ROWS:].sum()
        totals = totals[:ROWS].copy()
        totals.loc[f"{len(seconds) - ROWS} others"] = rest
    lines = [f"{'ms':>10}{'share':>8}{'calls':>9}  name"]
    for name, total, count in totals.itertuples():
        share = total / (totals["sum"].sum() or 1)
        cut = name if len(name) <= 90 else name[:89] + "…"
        lines.append(f"{1e3 * total / steps:10.3f}{share:8.1%}{count / steps:9.1f}  {cut}")
    return "\n".join(lines) + "\n"


def profile(what: str, setting: Setting, repeats: int) -> str:
    """Tabulate the time of the step `what` of the fast system."""
    device, system = torch.device(setting.device), systems_for(setting)["fast"]
    step = make_step(what, system, setting)
    if not setting.on_cuda:
        return on_cpu(step, device, repeats)
    return on_cuda(step, make_step(what, System(amp=system.amp), setting), device, repeats)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser("profile", __doc__)
    measure.add_sizes(parser)
    parser.add_argument("--out", type=Path, required=True, help="text file")
    args = parser.parse_args(argv)
    setting = measure.setting_of(args)
    about = {**measure.environment(setting), **setting.recorded()}
    text = "\n".join(f"{key}: {value}" for key, value in about.items()) + "\n"
    for what in STEPS:
        text += f"\n{what} step: {profile(what, setting, args.repeats)}"
    print(text)
    write_text(args.out, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(measure.run_or_refuse(main))
