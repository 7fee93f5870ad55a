"""Splits of a source: held out, made long-tailed, and kept in one file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ssnas.data.groups import folds_of_groups, hold_out_groups
from ssnas.data.longtail import PROFILES, class_counts, is_integer, subsample
from ssnas.data.npz import published_splits, read_arrays
from ssnas.data.types import SPLITS, Dataset, Source, Splits
from ssnas.errors import InputError
from ssnas.runtime.files import written_whole
from ssnas.runtime.mapped import joined, taken, write_npz


def split(
    source: Source,
    *,
    profile: str,
    imbalance: float,
    largest_class: int | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    max_images: int | None = None,
    labelled_fraction: float = 1.0,
    unlabelled: np.ndarray | None = None,
) -> Splits:
    """Split a source into training, validation and test images, the first two long-tailed.

    The steps draw from one generator, in this order:

    1. The test images are the published ones, untouched, or else `test_fraction` of the training
       images, which may be none. They come first, so that every profile is tested on the same
       images.
    2. The remaining training images follow the profile (`ssnas.data.longtail.class_counts`). A
       full class has as many images as the smallest class, and at most `largest_class`.
    3. At most `max_images` of them stay, drawn at random; the same holds for published validation
       images.
    4. A share `labelled_fraction` of them, drawn within each class, keeps its labels; the others
       are unlabelled images, which only a search sees.
    5. The validation images are the published ones, or else `val_fraction` of what is left.

    Held-out images are stratified by class, with at least one of every class; where images have
    groups, whole groups are held out. Multi-label images
    are held out at random: they have no single class, so only `natural` is accepted for them.

    The provenance adds profile, imbalance (None where it plays no part), largest_class,
    max_images, the fractions (None likewise), seed, counts_before (the training images of each
    class before the profile), and the counts and images of each split.

    Args:
        source: the images.
        profile: one of `ssnas.data.longtail.PROFILES`; `natural` keeps every image.
        imbalance: ρ, the largest class over the smallest, at least 1.
        largest_class: the most images of a full class, or None.
        val_fraction: in (0, 0.5].
        test_fraction: in [0, 0.5].
        seed: of the generator, at least 0.
        max_images: the most training images, or None.
        labelled_fraction: in (0, 1].
        unlabelled: more images without labels, uint8 (N, H, W, C).

    Raises:
        InputError: naming `profile`, `imbalance`, `largest_class`, `val_fraction`,
            `test_fraction` or `seed`, or the class that is too small to split.

    Example:
        A fifth of each class is test images, a tenth of the long-tailed rest validation images:

        >>> images, labels = np.zeros((200, 8, 8, 1), np.uint8), np.arange(200) % 2
        >>> source = Source(Dataset(images, labels, ("cat", "dog")), None, None, {}, True)
        >>> splits = split(
        ...     source, profile="exponential", imbalance=4, largest_class=None,
        ...     val_fraction=0.1, test_fraction=0.2, seed=0,
        ... )
        >>> splits.train.counts, splits.val.counts, splits.test.counts
        ([72, 18], [8, 2], [20, 20])
    """
    _check_profile(source, profile, largest_class)
    _check_numbers(val_fraction, test_fraction, seed)
    rng = np.random.default_rng(seed)
    train, val, test = source.train, source.val, source.test
    # Of the training images the indices alone: images may be more than the memory holds.
    pool = np.arange(len(train))
    if test is None:
        tested = pool[:0]
        if test_fraction:
            pool, tested = _hold_out(train, pool, test_fraction, rng, "test")
        test = train.take(tested)
    before = counts_of(train, pool)
    if profile != "natural":
        full = min(before) if largest_class is None else min(*before, largest_class)
        counts = class_counts(max(full, 1), train.num_classes, profile, imbalance)
        pool = pool[subsample(train.labels[pool], counts, rng, train.class_names)]
    pool = pool[_at_most(len(pool), max_images, rng)]
    if val is not None:
        val = val if max_images is None else val.take(_at_most(len(val), max_images, rng))
    if labelled_fraction < 1:
        least = 1 if val is not None else 2
        pool, rest = _labelled(train, pool, labelled_fraction, least, rng)
        more = () if unlabelled is None else (unlabelled,)
        unlabelled = joined(taken(train.images, rest), *more)
    if val is None:
        pool, validated = _hold_out(train, pool, val_fraction, rng, "validation")
        val = train.take(validated)
    train = train.take(pool)
    provenance = {
        **source.provenance,
        "profile": profile,
        "imbalance": None if profile in ("natural", "balanced") else imbalance,
        "largest_class": largest_class,
        "max_images": max_images,
        "val_fraction": val_fraction if source.val is None else None,
        "test_fraction": test_fraction if source.test is None else None,
        "labelled_fraction": labelled_fraction,
        "unlabelled_images": 0 if unlabelled is None else len(unlabelled),
        "seed": seed,
        "counts_before": before,
        "counts": {"train": train.counts, "val": val.counts, "test": test.counts},
        "images": {"train": len(train), "val": len(val), "test": len(test)},
    }
    if train.groups is not None:
        provenance["groups"] = {
            name: len(np.unique(part.groups))
            for name, part in (("train", train), ("val", val), ("test", test))
            if part.groups is not None
        }
    return Splits(train, val, test, provenance, source.flip, unlabelled)


def folds(dataset: Dataset, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut a data set into k folds for cross-validation.

    The folds are stratified: their numbers of images, and those of each class, differ by at most
    one. Multi-label images are dealt out at random. Where images have groups, whole groups
    are dealt out, and the numbers are as near to that as groups allow.

    Args:
        dataset: the images.
        k: the number of folds, at least 2.
        seed: of the drawing, at least 0.

    Returns:
        For each fold the sorted indices of its training and of its test images; each image is a
        test image of one fold.

    Raises:
        InputError: naming `k`, `seed`, or the class with fewer than k images.

    Example:
        >>> data = Dataset(np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 2, ("cat", "dog"))
        >>> [data.take(test).counts for _, test in folds(data, 3, seed=0)]
        [[1, 1], [1, 1], [1, 1]]
    """
    _check_seed(seed)
    if not is_integer(k, 2):
        raise InputError(f"k: found {k!r}; accepted: an integer from 2 up")
    if dataset.groups is not None:
        classes = np.zeros(len(dataset), np.int64) if dataset.multi_label else dataset.labels
        return folds_of_groups(classes, dataset.groups, k, seed)
    rng = np.random.default_rng(seed)
    if dataset.multi_label:
        sizes = {"all images": len(dataset)}
        order = rng.permutation(len(dataset))
    else:
        sizes = dict(zip(dataset.class_names, dataset.counts, strict=True))
        order = np.concatenate(
            [rng.permutation(np.flatnonzero(dataset.labels == c)) for c in range(len(sizes))]
        )
    smallest, size = min(sizes.items(), key=lambda item: item[1])
    if k > size:
        raise InputError(
            f"k: found {k} folds for class {smallest!r} of {size} images; accepted: "
            "2 to the smallest class"
        )
    fold = np.empty(len(dataset), dtype=np.int64)
    fold[order] = np.arange(len(dataset)) % k
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(k)]


def folds_of(source: Source, k: int, val_fraction: float, seed: int) -> list[Splits]:
    """Split a source for training and testing, as often as its test protocol asks for.

    A source with test images of its own has one fold: the published one. Another one is
    cross-validated: k stratified folds, each of which tests on the images that the others train on.

    Args:
        k: the number of folds of a cross-validation.
        val_fraction: the share of a fold's training images to validate on, where the source has no
            validation images of its own.

    Raises:
        InputError: if a class is too small for k folds or for the validation images.

    Example:
        >>> labels = np.repeat(np.arange(2), 6)
        >>> images = Dataset(np.zeros((12, 8, 8, 1), np.uint8), labels, ("cat", "dog"))
        >>> parts = folds_of(Source(images, None, None, {}, flip=True), 3, 0.25, seed=0)
        >>> [(len(fold.train), len(fold.val), len(fold.test)) for fold in parts]
        [(6, 2, 4), (6, 2, 4), (6, 2, 4)]
    """
    held_out: list[tuple[Dataset, Dataset | None]] = [(source.train, source.test)]
    if source.test is None:
        pool = source.train
        held_out = [(pool.take(train), pool.take(test)) for train, test in folds(pool, k, seed)]
    return [
        split(
            Source(train, source.val, test, source.provenance, source.flip),
            profile="natural",
            imbalance=1.0,
            largest_class=None,
            val_fraction=val_fraction,
            test_fraction=val_fraction,
            seed=seed,
        )
        for train, test in held_out
    ]


def write(splits: Splits, path: Path) -> None:
    """Write splits to one .npz in MedMNIST's layout, without pickles or compression.

    Equal splits give equal bytes. The file appears whole or not at all.

    Example:
        `read` gives the same splits back:

        >>> from tempfile import TemporaryDirectory
        >>> images = Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.arange(2), ("cat", "dog"))
        >>> splits = Splits(images, images, images, {"source": "toy"}, flip=True)
        >>> with TemporaryDirectory() as folder:
        ...     write(splits, Path(folder, "splits.npz"))
        ...     read(Path(folder, "splits.npz")).provenance
        {'source': 'toy'}
    """
    arrays = {
        f"{split}_{kind}": values
        for split in SPLITS
        for kind in ("images", "labels", "groups")
        if (values := getattr(getattr(splits, split), kind)) is not None
    }
    if splits.unlabelled is not None:
        arrays["unlabelled_images"] = splits.unlabelled
    with written_whole(Path(path)) as partial, partial.open("wb") as file:
        write_npz(
            file,
            arrays
            | {
                "class_names": np.array(splits.train.class_names),
                "flip": np.array(splits.flip),
                "provenance": np.array(json.dumps(splits.provenance, sort_keys=True)),
            },
        )


def read(path: Path) -> Splits:
    """Read splits that `write` wrote.

    Raises:
        InputError: naming the file, if it is missing, damaged or not one of splits.

    Example:
        >>> read(Path("data/nowhere/splits.npz"))
        Traceback (most recent call last):
        ssnas.errors.InputError: data/nowhere/splits.npz: not found; `dvc repro` makes it
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found; `dvc repro` makes it")
    arrays = read_arrays(path)
    keys = [f"{split}_images" for split in SPLITS] + ["class_names", "flip", "provenance"]
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InputError(
            f"{path}: {', '.join(missing)}: not found; accepted: a file of splits, as "
            "make-longtail writes it"
        )
    multi_label = arrays["train_labels"].ndim > 1 if "train_labels" in arrays else False
    tested = len(arrays["test_images"]) > 0
    if not tested:
        arrays = {key: value for key, value in arrays.items() if not key.startswith("test_")}
    parts = {
        split: dataset
        for split, dataset in published_splits(path, arrays, multi_label=multi_label).items()
        if dataset is not None
    }
    if not tested:
        parts["test"] = parts["train"].take(np.arange(0))
    try:
        provenance = json.loads(str(arrays["provenance"]))
    except json.JSONDecodeError:
        raise InputError(f"{path}: provenance: found no JSON; accepted: a JSON object") from None
    return Splits(
        **parts,
        provenance=provenance,
        flip=bool(arrays["flip"].all()),
        unlabelled=arrays.get("unlabelled_images"),
    )


def counts_of(dataset: Dataset, indices: np.ndarray) -> list[int]:
    """Count the images of each class, or with each label, among those at `indices`."""
    labels = dataset.labels[indices]
    if dataset.multi_label:
        return [int(count) for count in labels.sum(axis=0, dtype=np.int64)]
    return [int(count) for count in np.bincount(labels, minlength=dataset.num_classes)]


def _at_most(count: int, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Draw at most `limit` of `count` positions, in their order."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(rng.permutation(count)[:limit])


def _labelled(
    dataset: Dataset, pool: np.ndarray, fraction: float, least: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images that keep their labels, at least so many of every class, and the others."""
    labels = dataset.labels[pool]
    groups = (
        [np.arange(len(pool))]
        if dataset.multi_label
        else [np.flatnonzero(labels == c) for c in range(dataset.num_classes)]
    )
    kept = np.zeros(len(pool), dtype=bool)
    for members in groups:
        count = min(len(members), max(least, round(fraction * len(members))))
        kept[rng.permutation(members)[:count]] = True
    return pool[kept], pool[~kept]


def _hold_out(
    dataset: Dataset,
    pool: np.ndarray,
    fraction: float,
    rng: np.random.Generator,
    purpose: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a fraction of the images out; both sides keep at least one image of every class.

    Where images have groups, whole groups are held out, see `hold_out_groups`.

    Args:
        pool: the indices of the images to choose from.

    Returns:
        The indices of the rest, and of the held-out images.
    """
    labels = dataset.labels[pool]
    if dataset.groups is not None:
        names = ("all images",) if dataset.multi_label else dataset.class_names
        classes = np.zeros(len(pool), np.int64) if dataset.multi_label else labels
        held = hold_out_groups(classes, dataset.groups[pool], names, fraction, rng, purpose)
        return pool[~held], pool[held]
    if dataset.multi_label:
        classes = {"all images": np.arange(len(pool))}
    else:
        classes = {name: np.flatnonzero(labels == c) for c, name in enumerate(dataset.class_names)}
    held = np.zeros(len(pool), dtype=bool)
    for name, members in classes.items():
        if len(members) < 2:
            raise InputError(
                f"class {name!r}: found {len(members)} images to split off {purpose} images from; "
                "accepted: at least 2, one for each side"
            )
        # Halves are rounded down, so that a class of 3 can still be split twice.
        count = max(1, math.ceil(fraction * len(members) - 0.5))
        held[rng.permutation(members)[:count]] = True
    return pool[~held], pool[held]


def _check_profile(source: Source, profile: str, largest_class: int | None) -> None:
    if profile not in PROFILES:
        raise InputError(f"profile: found {profile!r}; accepted: {', '.join(PROFILES)}")
    if profile != "natural" and source.train.multi_label:
        raise InputError(
            f"profile: found {profile!r} for multi-label images, which have no single class; "
            "accepted: natural"
        )
    if largest_class is None:
        return
    if not is_integer(largest_class, 1):
        raise InputError(
            f"largest_class: found {largest_class!r}; accepted: null or an integer from 1 up"
        )
    if profile == "natural":
        raise InputError(
            f"largest_class: found {largest_class} with profile natural, which keeps every image; "
            "accepted: null, or another profile"
        )


def _check_numbers(val_fraction: float, test_fraction: float, seed: int) -> None:
    if not isinstance(val_fraction, int | float) or not 0 < val_fraction <= 0.5:
        raise InputError(f"val_fraction: found {val_fraction!r}; accepted: above 0, up to 0.5")
    if not isinstance(test_fraction, int | float) or not 0 <= test_fraction <= 0.5:
        raise InputError(f"test_fraction: found {test_fraction!r}; accepted: from 0 to 0.5")
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if not is_integer(seed, 0):
        raise InputError(f"seed: found {seed!r}; accepted: an integer from 0 up")
