"""What is odd about images and labels: said before any work, since no figure would tell."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ssnas.data.types import SPLITS, Dataset, Splits
from ssnas.runtime.mapped import chunks

FEW = 5
"""A class with fewer training images is pointed out."""

NAMED = 3
"""How many images a warning names."""

THUMBNAIL = 8
PAIRS = 2 * 10**8
"""With more pairs of images than this, near duplicates are not looked for."""

ALIKE, CORRELATED = 3.0, 0.97
"""Near duplicates: thumbnails that differ by at most so many grey levels (root of the mean square),
of images that correlate by at least so much."""


def oddities(splits: Splits) -> list[str]:
    """List what a person should know about the images of a run, a sentence each.

    Examples are images that are in two splits, or in two classes; images of one colour; classes
    that a split lacks or that have next to no image; groups that are in two splits.

    Example:
        >>> images = np.zeros((4, 8, 8, 1), np.uint8)
        >>> images[:3, 0] = np.arange(24).reshape(3, 8, 1)
        >>> data = Dataset(images, np.array([0, 1, 0, 1]), ("cat", "dog"))
        >>> splits = Splits(data, data.take([1]), data.take([2]), {}, flip=True)
        >>> for line in oddities(splits):
        ...     print(line)
        1 validation image is also a training image (0)
        1 test image is also a training image (0)
        1 training image has one colour throughout (3)
        the validation images have none of class 'cat'
        the test images have none of class 'dog'
        class 'cat' has 2 training images
        class 'dog' has 2 training images
    """
    parts = {name: getattr(splits, name) for name in SPLITS}
    digests = {name: _digests(part) for name, part in parts.items()}
    return [
        *_repeated(parts, digests),
        *_near(parts, digests),
        *(line for name, part in parts.items() for line in _constant(name, part)),
        *_class_sizes(parts),
        *_shared_groups(parts),
    ]


_WORDS = {"train": "training", "val": "validation", "test": "test"}


def _digests(data: Dataset) -> list[bytes]:
    return [
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for part in chunks(data.images)
        for image in data.images[part]
    ]


def _repeated(parts: dict[str, Dataset], digests: dict[str, list[bytes]]) -> list[str]:
    lines = []
    positions: dict[bytes, list[int]] = defaultdict(list)
    train = parts["train"]
    for i, digest in enumerate(digests["train"]):
        positions[digest].append(i)
    again = [same for same in positions.values() if len(same) > 1]
    if len(positions) == 1 and len(train) > 1:
        lines.append("all training images are the same")
    elif again:
        repeats = [i for same in again for i in same[1:]]
        lines.append(f"{_counted(train, repeats, 'train', 'repeats', 'repeat')} another one")
        mixed = [same[0] for same in again if len(np.unique(train.labels[same], axis=0)) > 1]
        if mixed:
            is_in = _counted(train, mixed, "train", "is", "are")
            lines.append(f"{is_in} also there under another label")
    for name, other in (("val", "train"), ("test", "train"), ("test", "val")):
        known = set(digests[other])
        if other == "val":
            known -= positions.keys()  # said already
        leaked = [i for i, digest in enumerate(digests[name]) if digest in known]
        lines += _also(parts[name], leaked, name, other, "also")
    return lines


def _near(parts: dict[str, Dataset], digests: dict[str, list[bytes]]) -> list[str]:
    """Look for held-out images that are a training image, encoded or resized once more."""
    lines = []
    train = parts["train"]
    known = set(digests["train"])
    for name in ("val", "test"):
        held = parts[name]
        if not len(held) or len(held) * len(train) > PAIRS:
            continue
        near = [
            i for i in _near_duplicates(held.images, train.images) if digests[name][i] not in known
        ]
        lines += _also(held, near, name, "train", "nearly")
    return lines


def _near_duplicates(held: np.ndarray, train: np.ndarray) -> list[int]:
    """Return the positions of the held-out images that are nearly a training image."""
    ours, theirs = _thumbnails(held), _thumbnails(train)
    squares = (theirs**2).sum(axis=1)
    near = []
    rows = max(1, 2**24 // len(train))
    for start in range(0, len(held), rows):
        some = ours[start : start + rows]
        distances = (some**2).sum(axis=1)[:, None] - 2 * some @ theirs.T + squares
        nearest = distances.argmin(axis=1)
        limit = ours.shape[1] * ALIKE**2
        for i in np.flatnonzero(distances[np.arange(len(some)), nearest] <= limit):
            if _correlation(held[start + i], train[nearest[i]]) >= CORRELATED:
                near.append(int(start + i))
    return near


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Average each image to at most `THUMBNAIL` rows and columns: float32 (N, D)."""
    height, width = (min(THUMBNAIL, side) for side in images.shape[1:3])
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    sizes = [
        np.diff([*starts, side])
        for starts, side in ((rows, images.shape[1]), (columns, images.shape[2]))
    ]
    parts = []
    for part in chunks(images):
        sums = np.add.reduceat(images[part].astype(np.float32).mean(axis=3), rows, axis=1)
        sums = np.add.reduceat(sums, columns, axis=2)
        parts.append((sums / (sizes[0][:, None] * sizes[1])).reshape(len(sums), -1))
    return np.concatenate(parts)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    # In grey: JPEG keeps colours at half the resolution.
    x, y = (image.astype(np.float64).mean(axis=2).ravel() for image in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0


def _constant(name: str, data: Dataset) -> list[str]:
    flat = []
    for part in chunks(data.images):
        images = data.images[part]
        same = (images == images[:, :1, :1]).all(axis=(1, 2, 3))
        flat += (np.flatnonzero(same) + part.start).tolist()
    if not flat:
        return []
    return [
        f"{_counted(data, flat, name, 'has', 'have', named=False)} one colour throughout "
        f"({_named(data, flat)})"
    ]


def _class_sizes(parts: dict[str, Dataset]) -> list[str]:
    lines = []
    names = parts["train"].class_names
    for split in ("train", "val", "test"):
        data = parts[split]
        missing = [repr(n) for n, count in zip(names, data.counts, strict=True) if not count]
        if missing and len(data):
            kind = "label" if data.multi_label else "class"
            lines.append(f"the {_WORDS[split]} images have none of {kind} {', '.join(missing)}")
    kind = "label" if parts["train"].multi_label else "class"
    for name, count in zip(names, parts["train"].counts, strict=True):
        if 0 < count < FEW:
            images = "image" if count == 1 else "images"
            lines.append(f"{kind} {name!r} has {count} training {images}")
    return lines


def _shared_groups(parts: dict[str, Dataset]) -> list[str]:
    lines = []
    for name, other in (("val", "train"), ("test", "train"), ("test", "val")):
        ours, theirs = parts[name].groups, parts[other].groups
        if ours is None or theirs is None:
            continue
        shared = len(np.intersect1d(ours, theirs))
        if shared:
            groups = "1 group has" if shared == 1 else f"{shared:,} groups have"
            lines.append(f"{groups} images among the {_WORDS[name]} and the {_WORDS[other]} images")
    return lines


def _also(data: Dataset, chosen: Sequence[int], split: str, other: str, how: str) -> list[str]:
    """Say that images of a split are also, or nearly, in another one; nothing where none are."""
    if not chosen:
        return []
    what = f"a {_WORDS[other]} image" if len(chosen) == 1 else f"{_WORDS[other]} images"
    count = _counted(data, chosen, split, f"is {how}", f"are {how}", named=False)
    return [f"{count} {what} ({_named(data, chosen)})"]


def _counted(
    data: Dataset, chosen: Sequence[int], split: str, one: str, several: str, named: bool = True
) -> str:
    images = "image" if len(chosen) == 1 else "images"
    which = f" ({_named(data, chosen)})" if named else ""
    return f"{len(chosen):,} {_WORDS[split]} {images}{which} {one if len(chosen) == 1 else several}"


def _named(data: Dataset, chosen: Sequence[int]) -> str:
    names = [str(i if data.ids is None else data.ids[i]) for i in chosen[:NAMED]]
    return ", ".join(names) + (", …" if len(chosen) > NAMED else "")
