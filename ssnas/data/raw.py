"""The files that a data set is read from, and their digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ssnas.data.listing import visible_files
from ssnas.runtime.files import sha256_of


def raw_paths(dataset: str, raw: Path) -> list[Path]:
    """List what a data set reads: its own path, or the entries of `raw` that bear its name.

    Example:
        >>> raw_paths("digits", Path("data/nowhere"))
        []
    """
    path = Path(dataset)
    if path.exists():
        return [path]
    return sorted(raw.glob(f"{dataset.removeprefix('medmnist:')}*"))


def file_of(array: str) -> str:
    """Name the file of an array that is named with it.

    Example:
        >>> file_of("photos/more.npz:images"), file_of("photos")
        ('photos/more.npz', 'photos')
    """
    path, _, _ = array.rpartition(":")
    return path if path.endswith(".npz") else array


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's visible files."""
    if not path.is_dir():
        return sha256_of(path)
    content = hashlib.sha256()
    for file in visible_files(path)[0]:
        name = os.fsencode(file.relative_to(path).as_posix())
        content.update(name + f" {sha256_of(file)}\n".encode())
    return content.hexdigest()


def images_digest(dataset: str, raw: Path) -> str | None:
    """Return a digest of the files that a data set is read from; None where there are none."""
    paths = raw_paths(dataset, raw)
    if not paths:
        return None
    listing = "".join(f"{path.as_posix()} {content_digest(path)}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()
