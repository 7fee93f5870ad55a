"""Which files of a folder are images, and of which class and split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssnas.errors import InputError

EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split that a folder is by its name in lower case, as common tools write them."""

SYSTEM = ("$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information")
"""Folders that file managers, archives and network drives leave, in lower case."""

SYSTEM_FILES = ("desktop.ini", "thumbs.db")


class File(NamedTuple):
    """An image of a folder: its split, the index of its class, and its path."""

    split: str
    label: int
    path: Path


class Listing(NamedTuple):
    """The files of a folder of images.

    Attributes:
        files: the images, in a fixed order.
        class_names: the names of the class folders.
        ignored: files that are no images by their content and folders that repeat one above them,
            relative to the folder. Hidden and system files are not listed.
        linked: the links on the way to images, relative to the folder.
    """

    files: list[File]
    class_names: tuple[str, ...]
    ignored: list[str]
    linked: list[str]


def list_folder(folder: Path) -> Listing:
    """List the images of a folder of one sub-folder a class, or of train, val and test folders.

    Raises:
        InputError: naming the folder, for fewer than two classes, a class without images, classes
            that differ between splits, or a folder beside the splits.
    """
    parts = _splits(folder) or {"train": folder}
    class_names = tuple(part.name for part in _sub_folders(parts["train"]))
    if len(class_names) < 2:
        raise InputError(
            f"{parts['train']}: found {len(class_names)} class folders; accepted: 2 or more, "
            "each with its images"
        )
    _refuse_splits_below_classes(parts["train"], class_names)
    files, ignored = [], []
    for split, part in parts.items():
        names = tuple(sub.name for sub in _sub_folders(part))
        if names != class_names:
            raise InputError(
                f"{part}: found classes {', '.join(names) or 'none'}; "
                f"accepted: those of train, {', '.join(class_names)}"
            )
        for label, name in enumerate(class_names):
            images, others = _walk(part / name)
            if not images:
                raise InputError(
                    f"{part / name}: found no image; accepted: files ending in "
                    f"{' '.join(EXTENSIONS)}, or images by their content"
                )
            files += [File(split, label, path) for path in images]
            ignored += [name_in(folder, path) for path in others]
    linked = sorted(name_in(folder, link) for link in _links(folder, files))
    return Listing(files, tuple(map(_text, class_names)), ignored, linked)


def name_in(folder: Path, path: Path) -> str:
    """Name a file by its path within a folder; bytes that are no UTF-8 are escaped.

    Example:
        >>> name_in(Path("photos"), Path("photos/cat/1.png"))
        'cat/1.png'
    """
    return _text(path.relative_to(folder).as_posix())


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _links(folder: Path, files: Sequence[File]) -> list[Path]:
    """List what leads out of the folder on the way to its files: linked folders and files."""
    places = {folder}
    for file in files:
        for place in (file.path, *file.path.parents):
            if place in places:
                break
            places.add(place)
    return [place for place in places if place.is_symlink()]


def image_files(folder: Path) -> list[Path]:
    """List the images in a folder and all below it, by name; hidden and system files are left out.

    Example:
        >>> image_files(Path("no/such/folder"))
        []
    """
    return _walk(folder)[0]


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits; nothing where the sub-folders are classes.

    Raises:
        InputError: for a folder beside the splits, or two for one split.
    """
    named = {sub: SPLIT_NAMES.get(sub.name.lower()) for sub in _sub_folders(folder)}
    train = [sub for sub, split in named.items() if split == "train"]
    if not train or not _sub_folders(train[0]):
        return {}
    parts: dict[str, Path] = {}
    for sub, split in named.items():
        if split is None:
            raise InputError(
                f"{folder}: found {sub.name} beside {train[0].name}; accepted: folders named "
                f"{', '.join(SPLIT_NAMES)}, in any case"
            )
        if split in parts:
            raise InputError(
                f"{folder}: found {parts[split].name} and {sub.name}, both for {split}; accepted: "
                "one folder each"
            )
        parts[split] = sub
    return {split: parts[split] for split in ("train", "val", "test") if split in parts}


def _refuse_splits_below_classes(folder: Path, class_names: tuple[str, ...]) -> None:
    """Refuse classes that all hold the same folders and no image: levels in another order."""
    inner = [tuple(sub.name for sub in _sub_folders(folder / name)) for name in class_names]
    if len(inner[0]) < 2 or any(names != inner[0] for names in inner):
        return
    if any(
        path.is_file() and not _hidden(path) for n in class_names for path in _entries(folder / n)
    ):
        return
    raise InputError(
        f"{folder}: found {', '.join(inner[0])} within each of {', '.join(class_names)}; accepted: "
        "one folder a class, or train, val and test folders (in any case) of those"
    )


def visible_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files in a folder and all below it, links followed once, and what is neither.

    Hidden and system files are left out.

    Returns:
        The files, and broken links and folders that repeat one above them, both by name.

    Example:
        >>> visible_files(Path("no/such/folder"))
        ([], [])
    """
    files: list[Path] = []
    neither: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        place = os.path.realpath(current)
        if place in seen:
            neither.append(current)
            continue
        seen.add(place)
        for path in _entries(current):
            if _hidden(path):
                continue
            if path.is_dir():
                waiting.append(path)
            else:
                (files if path.is_file() else neither).append(path)
    return sorted(files, key=lambda path: path.as_posix()), sorted(neither)


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the images in a folder and all below it, and what else is there."""
    files, neither = visible_files(folder)
    images = [path for path in files if _is_image(path)]
    others = set(files) - set(images)
    return images, sorted([*others, *neither])


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_image(path: Path) -> bool:
    """Tell whether a file is an image: by its name, or else by its first bytes."""
    if path.suffix.lower() in EXTENSIONS:
        return True
    try:
        with Image.open(path):
            return True
    except Exception:  # Pillow's readers of headers raise as much as its decoders
        return False


def _sub_folders(folder: Path) -> list[Path]:
    folders = (sub for sub in _entries(folder) if sub.is_dir() and not _hidden(sub))
    return sorted(folders, key=lambda sub: sub.name)


def _hidden(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(".") or name in SYSTEM or name in SYSTEM_FILES
