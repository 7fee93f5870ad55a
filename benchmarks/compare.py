"""Prints the ratios of all figures that two reports of one benchmark have in common.

    python -m benchmarks.compare benchmarks/results/cpu-2-cores.json benchmarks/results/mine.json

A ratio is the second report's figure over the first one's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import run_or_refuse
from ssnas.errors import InputError
from ssnas.report.files import read_json

MUST_MATCH = ("benchmark", "settings")
MACHINE = ("device", "host", "cores", "threads", "torch", "cuda", "python", "compiled_kernels")
FIGURES = ("limits", "results")
NOT_COMPARED = ("losses", "ratio")


def ratios(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """For each figure of both reports (first, second, second / first); others are left out.

    Raises:
        InputError: if a file is no report, or the two are not of one benchmark at one setting.
    """
    for key in MUST_MATCH:
        if key not in first or key not in second:
            raise InputError(f"{key}: missing; accepted are reports of step and of scaling")
        for name, own, other in _differences({key: first[key]}, {key: second[key]}):
            raise InputError(f"{name}: {own!r} and {other!r}; accepted are equal ones")
    own, other = (
        dict(_figures({key: report.get(key) for key in FIGURES})) for report in (first, second)
    )
    return {
        name: (value, other[name], other[name] / value)
        for name, value in own.items()
        if name in other and value
    }


def warnings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between the machines and versions of the two reports."""
    machines = [
        {key: report.get("environment", {}).get(key) for key in MACHINE}
        for report in (first, second)
    ]
    return [f"{name} differs: {own} and {other}" for name, own, other in _differences(*machines)]


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in {**first, **second}:
        own, other = first.get(key), second.get(key)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            yield from ((f"{key}.{name}", *pair) for name, *pair in _differences(own, other))
        elif own != other:
            yield key, own, other


def _figures(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in NOT_COMPARED:
            yield from _figures(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2 for reports that must not be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(argv)
    first, second = read_json(args.first), read_json(args.second)
    found = ratios(first, second)
    for line in warnings(first, second):
        print(f"warning: {line}", file=sys.stderr)
    width = max(map(len, found), default=0)
    print(f"{'figure':{width}}{'first':>14}{'second':>14}{'ratio':>9}")
    for name, (own, other, ratio) in found.items():
        print(f"{name:{width}}{own:14.4g}{other:14.4g}{ratio:9.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_or_refuse(main))
