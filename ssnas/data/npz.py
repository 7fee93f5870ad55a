"""Data sets in `.npz` files, in the layout of MedMNIST and without pickles."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ssnas.data.groups import numbered
from ssnas.data.types import SPLITS, Dataset, check_images
from ssnas.errors import InputError
from ssnas.runtime.mapped import read_npz

LAYOUT = "an .npz with train_images, train_labels and optionally val_* and test_*"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an .npz, without running code that it may hold; large ones are mapped.

    Raises:
        InputError: naming the file if it is missing or damaged, and the key of a pickle.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "toy.npz")
        ...     np.savez(path, train_labels=np.arange(3))
        ...     read_arrays(path)
        {'train_labels': array([0, 1, 2])}
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; accepted: {LAYOUT}")
    try:
        return read_npz(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):
        raise InputError(
            f"{path}: found a damaged file or no .npz; accepted: {LAYOUT} "
            "(delete it, then make or fetch it anew)"
        ) from None
    except ValueError as error:
        raise InputError(
            f"{path}: {error}: found pickled objects or a damaged array; accepted: plain arrays"
        ) from None


def published_splits(
    path: Path,
    arrays: dict[str, np.ndarray],
    class_names: Sequence[str] | None = None,
    multi_label: bool = False,
) -> dict[str, Dataset | None]:
    """Make data sets of the arrays of a file in MedMNIST's layout.

    Args:
        path: the file, as messages name it.
        arrays: `<split>_images`, uint8 (N, H, W) or (N, H, W, C), and `<split>_labels`, integers
            (N,) or (N, 1), or multi-hot rows (N, L), for the splits train, val and test; optionally
            `<split>_groups` (N,), integers or text that say which images belong together.
        class_names: one name for each class or label; if None, the names in the array
            `class_names`, or else numbers.
        multi_label: whether an image may have several labels; more than one column of labels
            implies it.

    Returns:
        The data sets by split, None for an absent val or test.

    Raises:
        InputError: naming the file, the key, the value and what is accepted.

    Example:
        >>> arrays = {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.arange(2)}
        >>> splits = published_splits(Path("toy.npz"), arrays)
        >>> splits["train"].images.shape, splits["train"].class_names, splits["test"]
        ((2, 8, 8, 1), ('0', '1'), None)
    """
    pairs = {split: _pair(path, arrays, split) for split in SPLITS}
    present = {split: pair for split, pair in pairs.items() if pair is not None}
    if "train" not in present:
        raise InputError(f"{path}: train_images: not found; accepted: {LAYOUT}")
    for split, (images, labels) in present.items():
        _check_alike(f"{path}: {split}_images", images, present["train"][0])
        _check_alike(f"{path}: {split}_labels", labels, present["train"][1])
    labels = np.concatenate([labels for _, labels in present.values()])
    if labels.shape[1] > 1 and not multi_label:
        _refuse_one_hot(path, labels)
    multi_label = multi_label or labels.shape[1] > 1
    if class_names is None and "class_names" in arrays:
        class_names = [str(name) for name in np.atleast_1d(arrays["class_names"])]
    if class_names is None:
        class_names = _numbered(path, labels, multi_label)
    groups = dict(zip(SPLITS, numbered([_groups(path, arrays, s) for s in SPLITS]), strict=True))
    splits = {
        split: pair and _dataset(path, split, *pair, tuple(class_names), multi_label, groups[split])
        for split, pair in pairs.items()
    }
    _check_classes(path, class_names, labels, multi_label)
    return splits


def _refuse_one_hot(path: Path, labels: np.ndarray) -> None:
    """Refuse rows with exactly one 1 each: they say one label an image, or several by chance."""
    if ((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all():
        raise InputError(
            f"{path}: train_labels: found rows with exactly one 1 each, {labels.shape[1]} columns; "
            "accepted: for one label an image its class index (labels.argmax(axis=1)), for several "
            "labels rows some of which have none or more than one"
        )


def _check_classes(
    path: Path, class_names: Sequence[str], labels: np.ndarray, multi_label: bool
) -> None:
    doubled = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if doubled:
        raise InputError(
            f"{path}: class_names: found {', '.join(doubled)} more than once; accepted: a name of "
            "its own for each class"
        )
    if multi_label:
        return
    if len(class_names) < 2:
        raise InputError(
            f"{path}: train_labels: found {len(class_names)} class; accepted: 2 or more"
        )
    if labels.min() > 0:
        raise InputError(
            f"{path}: train_labels: found labels from {labels.min()} to {labels.max()}; "
            "accepted: from 0 on"
        )


def _pair(
    path: Path, arrays: dict[str, np.ndarray], split: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pick the images (N, H, W, C) and labels (N, L) of one split; None if it has neither."""
    keys = (f"{split}_images", f"{split}_labels")
    missing = [key for key in keys if key not in arrays]
    if len(missing) == 2:
        return None
    if missing:
        raise InputError(f"{path}: {missing[0]}: not found; accepted: {LAYOUT}")
    images, labels = (arrays[key] for key in keys)
    images = images[..., None] if images.ndim == 3 else images
    check_images(images, f"{path}: {keys[0]}")
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or labels.size == 0:
        raise InputError(
            f"{path}: {keys[1]}: found {labels.dtype} {labels.shape}; "
            "accepted: integers (N,), (N, 1) or (N, L), N at least 1"
        )
    return images, labels[:, None] if labels.ndim == 1 else labels


def _groups(path: Path, arrays: dict[str, np.ndarray], split: str) -> np.ndarray | None:
    """Pick what the images of one split belong to; None where the file does not say."""
    groups = arrays.get(f"{split}_groups")
    if groups is None:
        return None
    images = len(arrays.get(f"{split}_images", ()))
    if groups.dtype.kind not in "iuUS" or groups.shape != (images,):
        raise InputError(
            f"{path}: {split}_groups: found {groups.dtype} {groups.shape} for {images} images; "
            "accepted: integers or text, one each"
        )
    return groups


def _check_alike(key: str, array: np.ndarray, train: np.ndarray) -> None:
    if array.shape[1:] != train.shape[1:]:
        raise InputError(
            f"{key}: found {array.shape[1:]} each; accepted: {train.shape[1:]}, as in train"
        )


def _numbered(path: Path, labels: np.ndarray, multi_label: bool) -> list[str]:
    """Name each class or label by its number."""
    classes = labels.shape[1] if multi_label else int(labels.max()) + 1
    if classes > labels.size:
        raise InputError(
            f"{path}: train_labels: found {classes - 1} among {len(labels)} images; "
            "accepted: class indices from 0 up without large gaps, or an array class_names"
        )
    return [str(c) for c in range(classes)]


def _dataset(
    path: Path,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    multi_label: bool,
    groups: np.ndarray | None,
) -> Dataset:
    if multi_label and not np.isin(labels, (0, 1)).all():
        raise InputError(f"{path}: {split}_labels: found values beyond 0 and 1; accepted: 0 and 1")
    labels = labels.astype(np.uint8) if multi_label else labels[:, 0].astype(np.int64)
    try:
        return Dataset(images, labels, class_names, groups)
    except InputError as error:
        raise InputError(f"{path}: {split}_{error}") from None


def labelled_arrays(
    images: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None
) -> dict[str, np.ndarray]:
    """Make the arrays of an .npz of images in memory.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C).
        labels: one of any type that can be sorted an image (N,), or 0 and 1 for each label (N, L).
        groups: which images belong together, integers or text (N,).

    Raises:
        InputError: naming what is not of that form.

    Example:
        >>> arrays = labelled_arrays(np.zeros((3, 8, 8), np.uint8), ["dog", "cat", "dog"])
        >>> arrays["train_labels"], arrays["class_names"]
        (array([1, 0, 1]), array(['cat', 'dog'], dtype='<U3'))
    """
    images, labels = np.asarray(images), np.asarray(labels)
    belonging = {} if groups is None else {"train_groups": np.asarray(groups)}
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(
            f"images: found {images.dtype} {images.shape}; accepted: uint8 (N, H, W) or "
            "(N, H, W, C)"
        )
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise InputError(
            f"labels: found {labels.shape} for {len(images)} images; accepted: (N,) or (N, L)"
        )
    if labels.ndim == 2:
        if not np.isin(labels, (0, 1)).all():
            raise InputError("labels: found (N, L) with other values; accepted: 0 and 1")
        return {"train_images": images, "train_labels": labels.astype(np.uint8), **belonging}
    try:
        classes, encoded = np.unique(labels, return_inverse=True)
    except TypeError:
        raise InputError("labels: found values of several types; accepted: of one") from None
    names = np.array([str(name) for name in classes])
    arrays = {"train_images": images, "train_labels": encoded, "class_names": names}
    return arrays | belonging
