"""Arrays that lie in files: as large as the disk, in as little memory as their reader touches."""

from __future__ import annotations

import mmap
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from ssnas.errors import InputError

LARGE = 2**28
"""Bytes from which on an array lies in a file."""

CHUNK = 2**24
"""Bytes that are copied at a time."""


def scratch(shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> np.ndarray:
    """Make an array to fill: in memory, or a large one in a temporary file that goes with it.

    Raises:
        InputError: if the folder of temporary files has no room.

    Example:
        >>> scratch((2, 3)).shape
        (2, 3)
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file, size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise InputError(
            f"{tempfile.gettempdir()}: no room for {size / 2**30:.1f} GiB of images "
            f"({error.strerror}); make some, or name another folder in TMPDIR"
        ) from error


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room now: a mapping that runs out of it later would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        for start in range(0, size, CHUNK):
            file.write(bytes(min(CHUNK, size - start)))
        file.flush()


def release(array: np.ndarray) -> None:
    """Give the memory of a mapped array's pages back; they are read again when they are needed.

    Arrays in memory stay as they are.

    Example:
        >>> release(np.zeros(3))
    """
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def chunks(array: np.ndarray, size: int = CHUNK) -> Iterator[slice]:
    """Cut the rows of an array into slices of at most `size` bytes, and release it after each.

    Example:
        >>> list(chunks(np.zeros((3, 2))))
        [slice(0, 3, None)]
    """
    row = max(1, array[:1].nbytes)
    rows = max(1, size // row)
    for start in range(0, len(array), rows):
        yield slice(start, min(start + rows, len(array)))
        release(array)


def taken(array: np.ndarray, indices: np.ndarray | slice) -> np.ndarray:
    """Copy the rows at `indices` (positions, a mask or a slice), in that order.

    Example:
        >>> taken(np.arange(5) * 2, np.array([3, 0]))
        array([6, 0])
    """
    indices = np.arange(len(array))[indices]
    copy = scratch((len(indices), *array.shape[1:]), array.dtype)
    for part in chunks(copy):
        copy[part] = array[indices[part]]
        release(array)
    return copy


def joined(*arrays: np.ndarray) -> np.ndarray:
    """Put arrays one after another, as `taken` takes from one.

    Example:
        >>> joined(np.zeros(2, np.uint8), np.ones(1, np.uint8))
        array([0, 0, 1], dtype=uint8)
    """
    if len(arrays) == 1:
        return arrays[0]
    whole = scratch((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    start = 0
    for array in arrays:
        for part in chunks(array):
            rows = array[part]
            whole[start : start + len(rows)] = rows
            start += len(rows)
            release(whole)
            release(array)
    return whole


def spread(count: int, limit: int) -> np.ndarray:
    """Choose at most `limit` of `count` positions, evenly spread.

    Example:
        >>> spread(10, 4), spread(3, 4)
        (array([0, 2, 5, 7]), array([0, 1, 2]))
    """
    chosen = min(count, limit)
    return np.arange(chosen) * count // max(chosen, 1)


def write_npz(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an .npz whose members are not compressed, so that they can be mapped.

    Equal arrays give equal bytes.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> write_npz(file, {"a": np.arange(3)})
        >>> _ = file.seek(0)
        >>> np.load(file)["a"]
        array([0, 1, 2])
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            # `open` with a name would write the time of now.
            member = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(member, "w", force_zip64=True) as opened:
                contiguous = array if array.nbytes >= LARGE else np.asarray(array, order="C")
                header = np.lib.format.header_data_from_array_1_0(contiguous)
                np.lib.format.write_array_header_1_0(opened, header)
                if array.ndim == 0:
                    opened.write(array.tobytes())
                    continue
                for part in chunks(contiguous):
                    opened.write(contiguous[part].tobytes())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz; large ones are mapped, or unpacked into a temporary file.

    Code that the file may hold is not run.

    Raises:
        BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError: for a damaged
            file.
        ValueError: for a member that is no plain array; its first argument is the key.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                continue
            key = member.filename.removesuffix(".npy")
            try:
                arrays[key] = _read_member(path, archive, member)
            except (ValueError, SyntaxError, TypeError, MemoryError, OverflowError) as error:
                raise ValueError(key) from error
    return arrays


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"version {version}")
        shape, columns_first, dtype = read_header(opened)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize if shape else dtype.itemsize
        start = opened.tell()
        if dtype.hasobject or start + size != member.file_size or min(shape, default=0) < 0:
            raise ValueError("pickled objects, or a header that does not fit")
        if size < LARGE or columns_first:
            content = bytearray(opened.read())
            flat = np.frombuffer(content, dtype) if size else np.empty(0, dtype)
            return flat.reshape(shape, order="F" if columns_first else "C")
        if member.compress_type == zipfile.ZIP_STORED:
            while opened.read(CHUNK):
                pass  # at the end, zipfile compares the checksum
            offset = _offset(path, member) + start
            return np.memmap(path, dtype, "c", offset, shape)
        array = scratch(shape, dtype)
        flat = array.reshape(-1).view(np.uint8)
        for part in chunks(flat):
            flat[part] = np.frombuffer(opened.read(part.stop - part.start), np.uint8)
        if opened.read(1):
            raise ValueError("more than its header says")
        return array


def _offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Find where the content of a member that is not compressed begins in the file."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra
