"""Images without labels, which only a search sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssnas.data.folders import Options, convert, read_images
from ssnas.data.listing import File, image_files
from ssnas.data.npz import read_arrays
from ssnas.data.types import Dataset, check_images
from ssnas.errors import InputError


def read_unlabelled(name: str, like: Dataset, options: Options) -> np.ndarray:
    """Read images without labels, in the size and the channels of labelled ones.

    Args:
        name: a folder, whose sub-folders count too, or an array of an .npz as `file.npz:array`.
        like: the labelled images.
        options: how to read files.

    Returns:
        uint8 (N, H, W, C), H, W and C as in `like`.

    Raises:
        InputError: naming the folder, file or array, for one that is not there or has no image, and
            by `ssnas.data.folders.read_images`.
    """
    height, width, channels = like.images.shape[1:]
    options = options._replace(
        size=height if height == width else None, channels="grey" if channels == 1 else "rgb"
    )
    path, _, array = name.rpartition(":")
    if Path(name).is_dir():
        files = [File("train", 0, file) for file in image_files(Path(name))]
        if not files:
            raise InputError(f"unlabelled: found no image in {name}; accepted: a folder of images")
        images = read_images(Path(name), files, options).images
    elif path.endswith(".npz"):
        images = _from_npz(Path(path), array, options)
    else:
        raise InputError(
            f"unlabelled: found {name!r}, which is no folder; accepted: a folder of images, or an "
            "array of an .npz as file.npz:array"
        )
    if images.shape[1:] != like.images.shape[1:]:
        raise InputError(
            f"unlabelled: found images of {images.shape[1:]} in {name} beside labelled ones of "
            f"{like.images.shape[1:]}; accepted: the same, or data.size"
        )
    return images


def _from_npz(path: Path, array: str, options: Options) -> np.ndarray:
    arrays = read_arrays(path)
    if array not in arrays:
        raise InputError(f"{path}: {array}: not found; choose from {', '.join(arrays)}")
    images = arrays[array]
    images = images[..., None] if images.ndim == 3 else images
    check_images(images, f"{path}: {array}")
    labels = np.zeros(len(images), np.int64)
    return convert(Dataset(images, labels, ("unlabelled",)), options).images
