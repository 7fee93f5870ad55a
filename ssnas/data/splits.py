"""Training, validation and test images: held out, made long-tailed, and kept in one file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ssnas.data.longtail import PROFILES, class_counts, is_integer, subsample
from ssnas.data.npz import published_splits, read_arrays
from ssnas.data.types import SPLITS, Dataset, Source, Splits
from ssnas.errors import InputError


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
) -> Splits:
    """Training, validation and test images of a source, the first two long-tailed.

    In this order, all drawn from one generator of `seed`:
    1. test: as published and untouched, or else `test_fraction` of the training images. It is
       drawn first, so it is the same one for every profile.
    2. The remaining training images follow `profile` and `imbalance`
       (`ssnas.data.longtail.class_counts`), where the full class is the smallest one
       that the source has, and at most `largest_class` images. `natural` keeps them as they are.
    3. At most `max_images` of them stay, drawn at random, and of published validation images.
    4. val: as published, or else `val_fraction` of these.

    Held-out images are stratified by class, at least one of every class. Those of multi-label
    data are drawn at random without strata: a class-count profile has no meaning there, and only
    `natural` is accepted.

    The provenance adds profile, imbalance (None where it plays no part), largest_class,
    max_images, the fractions (None likewise), seed, counts_before (the training images per class
    before the profile), and per split counts and images.

    Raises InputError naming `profile`, `imbalance`, `largest_class`, `val_fraction`,
    `test_fraction` or `seed`, or the class that is too small to split.
    """
    _check_profile(source, profile, largest_class)
    _check_numbers(val_fraction, test_fraction, seed)
    rng = np.random.default_rng(seed)
    pool, test, val = source.train, source.test, source.val
    if test is None:
        pool, test = _hold_out(pool, test_fraction, rng, "test")
    before = pool.counts
    if profile != "natural":
        full = min(before) if largest_class is None else min(*before, largest_class)
        counts = class_counts(max(full, 1), pool.num_classes, profile, imbalance)
        pool = pool.take(subsample(pool.labels, counts, rng, pool.class_names))
    pool = _at_most(pool, max_images, rng)
    if val is not None:
        val = _at_most(val, max_images, rng)
    else:
        pool, val = _hold_out(pool, val_fraction, rng, "validation")
    provenance = {
        **source.provenance,
        "profile": profile,
        "imbalance": None if profile in ("natural", "balanced") else imbalance,
        "largest_class": largest_class,
        "max_images": max_images,
        "val_fraction": val_fraction if source.val is None else None,
        "test_fraction": test_fraction if source.test is None else None,
        "seed": seed,
        "counts_before": before,
        "counts": {"train": pool.counts, "val": val.counts, "test": test.counts},
        "images": {"train": len(pool), "val": len(val), "test": len(test)},
    }
    return Splits(pool, val, test, provenance, source.flip)


def folds(dataset: Dataset, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """k pairs of sorted (training, test) indices; the test parts are a partition of the data.

    Stratified: each class's images, and all images, spread over the test parts with a
    difference of at most one. Multi-label data are dealt out at random.

    Raises InputError naming `k`, or the class with fewer than k images.
    """
    _check_seed(seed)
    if not is_integer(k, 2):
        raise InputError(f"k: found {k!r}; accepted: an integer from 2 up")
    rng = np.random.default_rng(seed)
    if dataset.multi_label:
        sizes, order = {"all images": len(dataset)}, rng.permutation(len(dataset))
    else:
        sizes = dict(zip(dataset.class_names, dataset.counts, strict=True))
        order = np.concatenate(
            [rng.permutation(np.flatnonzero(dataset.labels == c)) for c in range(len(sizes))]
        )
    smallest = min(sizes, key=sizes.get)
    if k > sizes[smallest]:
        raise InputError(
            f"k: found {k} folds for class {smallest!r} of {sizes[smallest]} images; accepted: "
            "2 to the smallest class"
        )
    fold = np.empty(len(dataset), dtype=np.int64)
    fold[order] = np.arange(len(dataset)) % k
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(k)]


def write(splits: Splits, path: Path) -> None:
    """Write splits to one compressed .npz, in MedMNIST's layout, that holds no pickles.

    Equal splits give equal bytes. The file appears whole or not at all.
    """
    arrays = {
        f"{split}_{kind}": getattr(getattr(splits, split), kind)
        for split in SPLITS
        for kind in ("images", "labels")
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                **arrays,
                class_names=np.array(splits.train.class_names),
                flip=np.array(splits.flip),
                provenance=np.array(json.dumps(splits.provenance, sort_keys=True)),
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Splits:
    """Read what `write` wrote. Raises InputError naming the file if it is anything else."""
    path = Path(path)
    arrays = read_arrays(path)
    wanted = [f"{split}_images" for split in SPLITS] + ["class_names", "flip", "provenance"]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise InputError(
            f"{path}: {', '.join(missing)}: not found; accepted: a file of splits, as "
            "make-longtail writes it"
        )
    multi_label = arrays["train_labels"].ndim > 1 if "train_labels" in arrays else False
    parts = published_splits(path, arrays, multi_label=multi_label)
    try:
        provenance = json.loads(str(arrays["provenance"]))
    except json.JSONDecodeError:
        raise InputError(f"{path}: provenance: found no JSON; accepted: a JSON object") from None
    return Splits(**parts, provenance=provenance, flip=bool(arrays["flip"].all()))


def _at_most(dataset: Dataset, limit: int | None, rng: np.random.Generator) -> Dataset:
    if limit is None or len(dataset) <= limit:
        return dataset
    return dataset.take(np.sort(rng.permutation(len(dataset))[:limit]))


def _hold_out(
    dataset: Dataset, fraction: float, rng: np.random.Generator, purpose: str
) -> tuple[Dataset, Dataset]:
    """The rest, and the held-out images; both keep at least one image of every class."""
    if dataset.multi_label:
        groups = {"all images": np.arange(len(dataset))}
    else:
        groups = {
            name: np.flatnonzero(dataset.labels == c) for c, name in enumerate(dataset.class_names)
        }
    held = np.zeros(len(dataset), dtype=bool)
    for name, members in groups.items():
        if len(members) < 2:
            raise InputError(
                f"class {name!r}: found {len(members)} images to split off {purpose} images from; "
                "accepted: at least 2, one for each side"
            )
        # Halves are rounded down, so that a class of 3 can still be split twice.
        count = max(1, math.ceil(fraction * len(members) - 0.5))
        held[rng.permutation(members)[:count]] = True
    return dataset.take(np.flatnonzero(~held)), dataset.take(np.flatnonzero(held))


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
    for key, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not isinstance(fraction, int | float) or not 0 < fraction <= 0.5:
            raise InputError(f"{key}: found {fraction!r}; accepted: above 0, up to 0.5")
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if not is_integer(seed, 0):
        raise InputError(f"seed: found {seed!r}; accepted: an integer from 0 up")
