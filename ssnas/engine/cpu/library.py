"""Compiled kernels for the CPU: built once for a machine, with its own C++ compiler, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("src") / "kernels.cpp"
COMPILERS = "g++", "clang++"
"""The compilers to look for where `CXX` names none."""

FLAGS = "-std=c++20", "-O3", "-shared", "-fPIC"
PROCESSOR_FLAGS = "-march=native", "-mcpu=native"
"""The first of them that the compiler accepts is used: some know only the second on ARM."""

# On macOS, PyTorch brings an OpenMP runtime that ends the process when it meets a second one.
OPENMP_FLAGS = () if sys.platform == "darwin" else ("-fopenmp",)
PROBE = "#ifdef _OPENMP\n#include <omp.h>\nint f() { return omp_get_max_threads(); }\n#endif\n"

TYPE_NAMES = {torch.float32: "float", torch.float64: "double"}


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernels, building them first where this machine has not done so.

    The file is kept in the user's cache folder, or else in a private temporary one, under a name
    that depends on the source, the compiler, the processor, and the file's own content.

    Returns:
        The kernels; None where they cannot be built, which is logged once, or where the
        environment variable `SSNAS_NATIVE` is 0.
    """
    if os.environ.get("SSNAS_NATIVE") == "0":
        return None
    try:
        return _kept_or_built(_compiler())
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        log.warning(
            "the search runs without its compiled kernels, several times slower (%s); install g++ "
            "with OpenMP, or set SSNAS_NATIVE=0 to hear no more of it",
            _cause(error),
        )
        return None


def _compiler() -> list[str]:
    """The command that compiles, with arguments if `CXX` has some, as in `ccache g++`."""
    named = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [named] if named else [[name] for name in COMPILERS]:
        path = shutil.which(program)
        if path is not None:
            return [path, *arguments]
    raise FileNotFoundError(f"there is no {named[0] if named else ' or '.join(COMPILERS)}")


def _kept_or_built(compiler: Sequence[str]) -> ctypes.CDLL:
    """Load the kernels from the first folder that has them, or else that they can be built in.

    Raises:
        OSError: if no folder serves.
        CalledProcessError: for a compiler that does not tell its version.
    """
    name = f"kernels-{_fingerprint(compiler)}"
    folders = _cache_folder, _private_temporary_folder
    for folder in folders:
        with suppress(OSError):  # building there says why
            for path in _intact(folder(), name):
                return _load(path)
    causes: list[str] = []
    for folder in folders:
        try:
            kernels = _load(_build(compiler, folder(), name))
        except (OSError, subprocess.CalledProcessError) as error:
            causes.append(_cause(error))
            continue
        if causes:
            place = "the compiled kernels are kept in %s, since the cache folder fails: %s"
            log.warning(place, folder(), causes[0])
        return kernels
    raise OSError("; ".join(dict.fromkeys(causes)))


def _cache_folder() -> Path:
    """The user's folder for files that can be made again.

    Raises:
        OSError: where there is none.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home directory: {error}") from error
    return folder / "ssnas"


def _private_temporary_folder() -> Path:
    """A folder for temporary files that nobody else may have written to.

    Raises:
        OSError: where there is none.
    """
    if not hasattr(os, "getuid"):
        raise FileNotFoundError("this system has no private temporary folder")
    folder = Path(tempfile.gettempdir()) / f"ssnas-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_private = status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not stat.S_ISDIR(status.st_mode) or not is_private:
        raise PermissionError(f"{folder} is open to others")
    return folder


def _fingerprint(compiler: Sequence[str]) -> str:
    """A name for all that the compiled code depends on."""
    version = _run([*compiler, "--version"])
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = *compiler, *FLAGS, *PROCESSOR_FLAGS, *OPENMP_FLAGS
    described = *flags, version, platform.machine(), platform.processor(), features
    parts = [SOURCE.read_bytes(), *(text.encode() for text in described)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _intact(folder: Path, name: str) -> Iterator[Path]:
    """The libraries of this name whose content is what was written.

    To load one that was cut off or overwritten could end the process.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_digest(path)}":
            yield path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _build(compiler: Sequence[str], folder: Path, name: str) -> Path:
    """Compile the kernels into a file of `folder` and return its path.

    Raises:
        OSError: for a folder that cannot be written to, or a result that is no library.
        CalledProcessError: for a compiler that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        built = Path(workplace) / "kernels.so"
        flags = [*FLAGS, *_optional_flags(compiler, Path(workplace))]
        _run([*compiler, *flags, str(SOURCE), "-o", str(built)])
        _load(built)
        path = folder / f"{name}-{_digest(built)}.so"
        # Another process may build the same file: the last one to finish wins, whole.
        built.replace(path)
    return path


def _optional_flags(compiler: Sequence[str], workplace: Path) -> list[str]:
    """The flags that this compiler accepts: at most one for the processor, and OpenMP's."""
    probe = workplace / "probe.cpp"
    probe.write_text(PROBE, encoding="utf-8")

    def accepts(flag: str) -> bool:
        try:
            _run([*compiler, *FLAGS, flag, str(probe), "-o", str(workplace / "probe.so")])
        except subprocess.CalledProcessError:
            return False
        return True

    processor = next(filter(accepts, PROCESSOR_FLAGS), None)
    openmp = [flag for flag in OPENMP_FLAGS if accepts(flag)]
    if not openmp:
        log.info("the compiled kernels use one thread: %s has no OpenMP", shlex.join(compiler))
    return [*([processor] if processor else []), *openmp]


def _run(command: Sequence[str]) -> str:
    """The output of a program; its messages are in English, whatever the user's language."""
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(
        command, capture_output=True, check=True, text=True, errors="replace", env=environment
    )
    return done.stdout


def _load(path: Path) -> ctypes.CDLL:
    """Load a library of kernels.

    Raises:
        OSError: for a file that is none.
    """
    kernels = ctypes.CDLL(str(path))
    try:
        kernels.run.restype = None
        table = ctypes.c_void_p, ctypes.c_long
        kernels.run.argtypes = [*table * 3, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    except AttributeError as error:
        raise OSError(f"{path} has no kernels: {error}") from error
    return kernels


def _cause(error: Exception) -> str:
    """One line that says why: of a compiler's messages the first error, of it or its linker."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    # What the compiler says of its linker has no reason.
    is_error = re.compile(r"\berror: (?!ld returned|linker command)|\bld: (?!warning)").search
    return next(filter(is_error, lines), lines[0] if lines else type(error).__name__)


def usable(x: Tensor) -> bool:
    """Tell whether the kernels can compute with this tensor here and now."""
    return (
        x.is_cpu
        and x.dtype in TYPE_NAMES
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


def bind(
    dtype: torch.dtype,
    words: Sequence[int],
    addresses: Sequence[tuple[int, int]],
    calls: Sequence[tuple[str, int]],
) -> Callable[[Sequence[Tensor | None], list[float] | None], None]:
    """Bind calls of kernels to one function that makes them, one after the other.

    Args:
        dtype: of the tensors.
        words: the arguments of all calls, 8 bytes each.
        addresses: of each word that is an address, its index and the tensor that it lies in,
            counted from 1, or 0 for the words themselves; the word holds the bytes after the start.
        calls: the kernel, by its name without the type, and the index of its first word.

    Returns:
        The function. It takes the tensors, and a list that it extends by the seconds that each call
        took, or None.

    Raises:
        RuntimeError: where there are no kernels.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("there are no compiled kernels")
    functions = [(_address(kernels, f"{name}_{TYPE_NAMES[dtype]}"), first) for name, first in calls]
    tables = functions, [(word,) for word in words], addresses
    arguments = [argument for table in tables for argument in (_longs(table), len(table))]
    native = kernels.run

    def run(tensors: Sequence[Tensor | None], seconds: list[float] | None) -> None:
        # The first is for the words' own address.
        starts = [None, *(None if tensor is None else tensor.data_ptr() for tensor in tensors)]
        pointers = (ctypes.c_void_p * len(starts))(*starts)
        taken = None if seconds is None else (ctypes.c_double * len(calls))()
        native(*arguments, pointers, taken, torch.get_num_threads())
        if seconds is not None and taken is not None:
            seconds.extend(taken)

    return run


def _longs(rows: Sequence[tuple[int, ...]]) -> ctypes.Array[ctypes.c_long]:
    values = [value for row in rows for value in row]
    return (ctypes.c_long * len(values))(*values)


@cache
def _address(kernels: ctypes.CDLL, function: str) -> int:
    address = ctypes.cast(kernels[function], ctypes.c_void_p).value
    assert address is not None
    return address
