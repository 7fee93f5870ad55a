"""Compiled kernels for the CPU: built once for a machine, with its own C++ compiler, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("src") / "kernels.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
NAMES = {torch.float32: "float", torch.float64: "double"}


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be built or `SSNAS_NATIVE` is 0.

    The file is kept in the user's cache folder under a name that depends on the source, the
    compiler and the processor.
    """
    if os.environ.get("SSNAS_NATIVE") == "0":
        return None
    named = os.environ.get("CXX", "g++")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssnas"
    try:
        compiler = shutil.which(named)
        if compiler is None:
            raise FileNotFoundError(f"there is no {named}")
        path = folder / f"kernels-{_fingerprint(compiler)}.so"
        if not path.exists():
            _build(compiler, path)
        found = ctypes.CDLL(str(path))
        found.run.restype = None
        found.run.argtypes = [ctypes.c_void_p, ctypes.c_long] * 3 + [ctypes.c_void_p] * 2
        return found
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0]
        log.warning(
            "the search runs without its compiled kernels, several times slower (%s); install g++ "
            "with OpenMP, or set SSNAS_NATIVE=0 to hear no more of it",
            detail,
        )
        return None


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    described = [" ".join(FLAGS), platform.machine(), platform.processor(), flags]
    parts = [SOURCE.read_bytes(), version, *(text.encode() for text in described)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, text=True)
        # Another process may build the same file: the last one to finish wins, whole.
        built.replace(path)


def usable(x: Tensor) -> bool:
    """Whether the kernels can compute with this tensor here and now."""
    return (
        x.is_cpu
        and x.dtype in NAMES
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


def linked(
    dtype: torch.dtype,
    words: Sequence[int],
    addresses: Sequence[tuple[int, int]],
    calls: Sequence[tuple[str, int]],
) -> Callable[[Sequence[Tensor | None], list[float] | None], None]:
    """What makes calls of kernels, one after the other, on the tensors that it gets.

    It also takes a list that it extends by the seconds that each call took, or None.

    Args:
        dtype: of the tensors.
        words: the arguments of all calls, 8 bytes each.
        addresses: of each word that is one, its index and the tensor that it lies in, counted from
            1, or 0 for the words themselves; the word says how many bytes after the start.
        calls: the kernel, by its name without the type, and the first of its words.
    """
    functions = [(_address(f"{name}_{NAMES[dtype]}"), first) for name, first in calls]
    tables = functions, [(word,) for word in words], addresses
    arguments = [argument for table in tables for argument in (_longs(table), len(table))]
    native = library().run

    def run(tensors: Sequence[Tensor | None], seconds: list[float] | None) -> None:
        # The first is for the words' own address.
        starts = [None, *(None if own is None else own.data_ptr() for own in tensors)]
        taken = None if seconds is None else (ctypes.c_double * len(calls))()
        native(*arguments, (ctypes.c_void_p * len(starts))(*starts), taken)
        if seconds is not None:
            seconds.extend(taken)

    return run


def _longs(rows: Sequence[tuple[int, ...]]) -> ctypes.Array:
    values = [value for row in rows for value in row]
    return (ctypes.c_long * len(values))(*values)


@cache
def _address(function: str) -> int:
    return ctypes.cast(library()[function], ctypes.c_void_p).value
