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
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
NAMES = {torch.float32: "float", torch.float64: "double"}


Long = ctypes.c_long


class Shape(ctypes.Structure):
    """Sizes of convolutions or a pooling, as `Shape` of kernels.cpp."""

    _fields_ = [
        (name, Long)
        for name in (
            *("n", "image_height", "image_width", "height", "width", "step"),
            *("channels", "operations", "shared", "kernel", "stride", "dilation"),
        )
    ]


class Term(ctypes.Structure):
    """`Term` of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "mean", "var", "weight", "bias", "scale")),
        ("eps", ctypes.c_double),
        *((name, Long) for name in ("fixed", "width", "sum", "place", "slot")),
    ]


class Record(ctypes.Structure):
    """`Record` of kernels.cpp."""

    _fields_ = [
        ("momentum", ctypes.c_double),
        *((n, ctypes.c_void_p) for n in ("running_mean", "running_var", "mean", "var")),
        *((name, Long) for name in ("channels", "pixels")),
    ]


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
        return ctypes.CDLL(str(path))
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


def call(function: str, dtype: torch.dtype, *arguments) -> None:
    """Call a function of kernels.cpp.

    Args:
        function: its name, without the type.
        dtype: of the tensors.
        arguments: numbers, structures, tensors (dense, in the layout that the function expects),
            sequences of those, and None for what it shall not read or write.
    """
    found = _function(function, dtype)
    if found.argtypes is None:
        # Addresses and `long` are passed alike.
        found.argtypes = [
            ctypes.c_double if type(argument) is float else ctypes.c_void_p
            for argument in arguments
        ]
    found(*map(_converted, arguments))


@cache
def _function(name: str, dtype: torch.dtype) -> Callable:
    found = library()[f"{name}_{NAMES[dtype]}"]
    found.restype = None
    return found


def _converted(argument):
    if argument is None or type(argument) is int:
        return argument
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, list | tuple):
        addresses = [None if x is None else x.data_ptr() for x in argument]
        return (ctypes.c_void_p * len(argument))(*addresses)
    if isinstance(argument, Shape | ctypes.Array):
        return ctypes.addressof(argument)
    return argument
