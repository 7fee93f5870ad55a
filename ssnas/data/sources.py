"""Sources of images: bundled with a package, downloaded, or the user's files.

To add a source, write its reader here and give it a line in `READERS`.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssnas.data.folders import Options, check_options, convert, read_folder
from ssnas.data.groups import numbered, read_groups
from ssnas.data.npz import published_splits, read_arrays
from ssnas.data.types import Dataset, Source
from ssnas.errors import InputError

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FASHION_MNIST_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
COVID19_CLASSES = ("Covid-19", "No_findings")
MULTI_LABEL = ("chestmnist",)
"""MedMNIST's sets of several labels an image, for where its package is not at hand."""

LISTED = 20
"""How many ignored files the provenance names."""

MEDMNIST_SIZES = (28, 64, 128, 224)
_SIZED = tuple(f"_{size}" for size in MEDMNIST_SIZES)
# A mirrored chest or abdomen shows the heart or the liver on the wrong side, which is a rare
# finding of its own (situs inversus), and organ*mnist tells left from right in its labels.
# Cells, tissue and skin have no such side, and a mirrored left eye or breast is a right one.
LATERAL = ("chestmnist", "pneumoniamnist", "organ")


COVID19_GROUPS = (
    r"(\d{8})_\d{3}\.|(nejm[a-z]+\d+)_|(.+\.pdf)-\d+|(covid-19-pneumonia(?:-[a-z]+)*-\d+)"
)
"""The patient in the names of NIH ChestX-ray14's files, and the case or article in those of the
collection of Cohen et al. 2020, which the COVID-19 set is from."""


class RawSource(NamedTuple):
    """A source as its reader leaves it, before `load` converts the images.

    Attributes:
        splits: the data sets by split; a val or test that is not published is None or absent.
        flip: whether a mirrored image is still a plausible one.
        origin: the file, folder, function or address that the images come from.
        sha256: a checksum of the file, of a folder's files, or of the arrays.
        notes: what else belongs in the provenance.
    """

    splits: Mapping[str, Dataset | None]
    flip: bool
    origin: str
    sha256: str
    notes: Mapping[str, Any]


class Reader(NamedTuple):
    """An entry of `READERS`.

    Attributes:
        read: reads the source; its arguments are the name, the folder of downloaded data and the
            options.
        help: describes the images to a user.
        matches: whether a name is of this kind of source; None if the key is the only name.
    """

    read: Callable[[str, Path, Options], RawSource]
    help: str
    matches: Callable[[str], bool] | None = None


def load(
    name: str,
    raw: Path,
    size: int | None = None,
    channels: str = "keep",
    bad_images: str = "error",
    flip: bool | None = None,
    white_level: int | None = None,
    groups: str | None = None,
) -> Source:
    """Read a source of images.

    The provenance records source, origin, sha256 (of the file, of the files of a folder, or of
    the arrays), original_counts of each split, image_size (H, W, C), classes, skipped (the bad
    images), ignored (the files that are no images), white_level, and any note.

    Args:
        name: a source among `READERS`, which `describe_sources` lists.
        raw: the folder of downloaded data.
        size: the side of the square images in pixels, or None to keep their size; the shorter
            side is resized to it (antialiased) and the centre cut out.
        channels: `keep`, `grey` or `rgb`.
        bad_images: `error`, or `skip` to leave unreadable files of a folder out.
        flip: whether horizontal flips are allowed; None for what is known of the source. Sources
            allow them but for digits and for images of the body's inside, where left and right
            differ; an .npz may say so itself by a boolean array `flip`.
        white_level: the value that is white in files of more than 8 bits; None for what they say or
            hold, see `ssnas.data.folders.white_level`.
        groups: which images of a folder belong together, see `ssnas.data.groups.read_groups`; None
            for what is known of the source. An .npz says so itself by arrays `<split>_groups`.

    Raises:
        InputError: naming the key, file or class, the value and what is accepted.

    Example:
        >>> digits = load("digits", Path("data/raw"), size=16)
        >>> digits.train.images.shape, digits.test, digits.flip
        ((1797, 16, 16, 1), None, False)
    """
    options = Options(size, channels, bad_images, white_level)
    check_options(options)
    source = _reader(name).read(name, Path(raw), options)
    if groups is not None:
        source = source._replace(splits=_grouped(source.splits, groups))
    splits = {
        split: convert(data, options) for split, data in source.splits.items() if data is not None
    }
    splits = {
        split: data if data.ids is not None else dataclasses.replace(data, ids=np.arange(len(data)))
        for split, data in splits.items()
    }
    train = splits["train"]
    provenance = {
        "source": name,
        "origin": source.origin,
        "sha256": source.sha256,
        "original_counts": {split: data.counts for split, data in splits.items()},
        "classes": list(train.class_names),
        "image_size": list(train.images.shape[1:]),
        "flip": source.flip if flip is None else flip,
        "skipped": {"count": 0, "names": []},
        **source.notes,
    }
    flip = source.flip if flip is None else flip
    return Source(train, splits.get("val"), splits.get("test"), provenance, flip)


def _grouped(splits: Mapping[str, Dataset | None], rule: str) -> dict[str, Dataset | None]:
    """Give the images of a folder their groups.

    Raises:
        InputError: for images without file names, or by `ssnas.data.groups.read_groups`.
    """
    present = {split: data for split, data in splits.items() if data is not None}
    ids = {split: data.ids for split, data in present.items()}
    if any(names is None for names in ids.values()):
        raise InputError(
            f"groups: found {rule!r} for images that have no file names; accepted: null; an .npz "
            "has arrays train_groups, val_groups and test_groups instead"
        )
    names = [str(name) for values in ids.values() if values is not None for name in values]
    (numbers,) = numbered([read_groups(rule, names)])
    assert numbers is not None
    parts = np.split(numbers, np.cumsum([len(data) for data in present.values()])[:-1])
    return {
        split: dataclasses.replace(data, groups=part)
        for (split, data), part in zip(present.items(), parts, strict=True)
    }


def describe_sources() -> str:
    """List the sources that `load` accepts, one a line, each with its description.

    Example:
        >>> print(describe_sources().splitlines()[0])
        digits: 1,797 grey 8 x 8 digits (scikit-learn), no published test set
    """
    return "\n".join(f"{name}: {reader.help}" for name, reader in READERS.items())


def _reader(name: str) -> Reader:
    for key, reader in READERS.items():
        if name == key if reader.matches is None else reader.matches(name):
            return reader
    accepted = ", ".join(READERS)
    raise InputError(f"dataset: found {name!r}, which is no folder either; accepted: {accepted}")


def _digits(name: str, raw: Path, options: Options) -> RawSource:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple(str(digit) for digit in bunch.target_names)
    dataset = Dataset(images, bunch.target.astype(np.int64), names)
    return _arrays({"train": dataset}, flip=False, origin="sklearn.datasets.load_digits")


def _faces(name: str, raw: Path, options: Options) -> RawSource:
    from skimage.data import lfw_subset

    images = np.round(lfw_subset() * 255).astype(np.uint8)[..., None]
    labels = np.repeat(np.arange(2), 100)
    dataset = Dataset(images, labels, ("face", "non-face"))
    return _arrays({"train": dataset}, flip=True, origin="skimage.data.lfw_subset")


def _cifar10(name: str, raw: Path, options: Options) -> RawSource:
    path = raw / "cifar10.npz"
    if path.is_file():
        return _file(path, flip=True, class_names=CIFAR10_CLASSES)
    from torchvision.datasets import CIFAR10

    with _downloading(f"cifar-10-python.tar.gz or cifar10.npz in {raw}"):
        parts = {
            split: CIFAR10(raw, train=split == "train", download=True)
            for split in ("train", "test")
        }
    splits = {
        split: Dataset(part.data, np.array(part.targets, dtype=np.int64), CIFAR10_CLASSES)
        for split, part in parts.items()
    }
    return _arrays(splits, flip=True, origin=CIFAR10.url)


def _fashion_mnist(name: str, raw: Path, options: Options) -> RawSource:
    folder = raw / name
    if folder.is_dir():
        splits = {
            split: Dataset(
                _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)[..., None],
                _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1).astype(np.int64),
                FASHION_MNIST_CLASSES,
            )
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }
        return _arrays(splits, flip=True, origin=str(folder))
    from torchvision.datasets import FashionMNIST

    with _downloading(f"the folder {folder} with the four published .gz files"):
        parts = {
            split: FashionMNIST(raw, train=split == "train", download=True)
            for split in ("train", "test")
        }
    splits = {
        split: Dataset(part.data.numpy()[..., None], part.targets.numpy(), FASHION_MNIST_CLASSES)
        for split, part in parts.items()
    }
    return _arrays(splits, flip=True, origin=FashionMNIST.mirrors[0])


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a compressed IDX file of bytes: two zeros, 8 for bytes, the dimensions, the sizes, data.

    Raises:
        InputError: naming the file, if it is missing or something else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); accepted: the published file"
        ) from None
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:start], ">u4").tolist()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(sizes):
        raise InputError(f"{path}: found no IDX of bytes; accepted: the published file")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()


def _medmnist(name: str, raw: Path, options: Options) -> RawSource:
    flag = name.removeprefix("medmnist:")
    info = _medmnist_info(flag)
    size = next((s for s in MEDMNIST_SIZES if s >= (options.size or 0)), None)
    if size is None:
        raise InputError(
            f"size: found {options.size}; accepted: up to {MEDMNIST_SIZES[-1]} for {name}"
        )
    path = raw / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if not path.is_file():
        _fetch_medmnist(path, info, size)
    flip = not flag.startswith(LATERAL)
    if info is None:
        return _file(path, flip, multi_label=flag in MULTI_LABEL)
    source = _file(path, flip, *_labels_of(info))
    images = sum(len(data) for data in source.splits.values() if data is not None)
    published = sum(info["n_samples"].values())
    if images == published:
        return source
    note = f"a sample of {images:,} images of the published {published:,}"
    return source._replace(notes={**source.notes, "note": note})


def _medmnist_info(flag: str) -> dict[str, Any] | None:
    """Look a 2-D set up in the medmnist package; None without the package."""
    published = _published_sets()
    if published and flag not in published:
        flags = ", ".join(published)
        raise InputError(f"dataset: found 'medmnist:{flag}'; accepted flags: {flags}")
    return published.get(flag)


def _published_sets() -> dict[str, dict[str, Any]]:
    """List MedMNIST's 2-D sets by flag; none without the package."""
    try:
        from medmnist import INFO
    except ImportError:
        return {}
    return {flag: info for flag, info in INFO.items() if not flag.endswith("3d")}


def _labels_of(info: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Return the names of a MedMNIST set's labels, and whether an image may have several."""
    return tuple(info["label"].values()), "multi-label" in info["task"]


def _fetch_medmnist(path: Path, info: dict[str, Any] | None, size: int) -> None:
    if info is None:
        raise InputError(
            f"{path}: not found; accepted: the file, or the package medmnist to fetch it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    import medmnist

    with _downloading(f"{path.name} in {path.parent}"):
        published = getattr(medmnist, info["python_class"])
        published(split="train", root=str(path.parent), download=True, size=size)


def _covid19(name: str, raw: Path, options: Options) -> RawSource:
    folder = raw / name
    missing = [part for part in COVID19_CLASSES if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"{folder}: found no folder {' or '.join(missing)}; accepted: the images of Ozturk et "
            f"al. 2020 in the folders {' and '.join(COVID19_CLASSES)} there"
        )
    source = _folder(str(folder), raw, options)._replace(flip=False)
    present = [data for data in source.splits.values() if data is not None]
    names = [str(name) for data in present if data.ids is not None for name in data.ids]
    if not any(re.match(COVID19_GROUPS, name.rpartition("/")[2]) for name in names):
        return source
    return source._replace(splits=_grouped(source.splits, COVID19_GROUPS))


def _npz(name: str, raw: Path, options: Options) -> RawSource:
    """Read an .npz; one with the name of a MedMNIST file is treated as what it is."""
    path = Path(name)
    flag = path.stem.rpartition("_")[0] if path.stem.endswith(_SIZED) else path.stem
    info = _published_sets().get(flag)
    if info is None:
        return _file(path, flip=True)
    try:
        return _file(path, not flag.startswith(LATERAL), *_labels_of(info))
    except InputError:  # it bears the name, and holds other classes
        return _file(path, flip=True)


def _folder(name: str, raw: Path, options: Options) -> RawSource:
    folder = read_folder(Path(name), options)
    left_out = {
        "skipped": {"count": len(folder.skipped), "names": folder.skipped},
        "ignored": {"count": len(folder.ignored), "names": folder.ignored[:LISTED]},
        "white_level": folder.white_level,
        "linked": {"count": len(folder.linked), "names": folder.linked[:LISTED]},
    }
    return RawSource(folder.splits, True, name, folder.sha256, left_out)


def _file(
    path: Path,
    flip: bool,
    class_names: tuple[str, ...] | None = None,
    multi_label: bool = False,
) -> RawSource:
    """Read an .npz in MedMNIST's layout, which may say its own provenance and flip."""
    arrays = read_arrays(path)
    splits = published_splits(path, arrays, class_names, multi_label)
    notes = {"provenance": str(arrays["provenance"])} if "provenance" in arrays else {}
    if "flip" in arrays:
        if arrays["flip"].dtype != np.bool_ or arrays["flip"].size != 1:
            raise InputError(
                f"{path}: flip: found {arrays['flip'].dtype} {arrays['flip'].shape}; accepted: one "
                "boolean"
            )
        flip = bool(arrays["flip"].all())
    return RawSource(splits, flip, str(path), _file_sha256(path), notes)


def _arrays(splits: dict[str, Dataset], flip: bool, origin: str) -> RawSource:
    digest = hashlib.sha256()
    for data in splits.values():
        digest.update(data.images.tobytes())
        digest.update(data.labels.tobytes())
    return RawSource(splits, flip, origin, digest.hexdigest(), {})


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _downloading(instead: str) -> Iterator[None]:
    """Turn the errors of a failed download into one that says which file to put where."""
    try:
        yield
    except (OSError, HTTPException, RuntimeError) as error:
        # urllib's URLError is an OSError; the packages' own messages run over many lines.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"download: failed ({reason}); put by hand: {instead}") from None


READERS: dict[str, Reader] = {
    "digits": Reader(_digits, "1,797 grey 8 x 8 digits (scikit-learn), no published test set"),
    "faces": Reader(
        _faces,
        "100 faces and 100 non-faces, grey 25 x 25 (scikit-image), no published test set",
    ),
    "cifar10": Reader(
        _cifar10,
        "cifar10.npz among the downloaded data (arrays train_images, train_labels, test_images, "
        "test_labels, optionally the string provenance), or else the published archive, fetched",
    ),
    "fashion-mnist": Reader(
        _fashion_mnist,
        "the published files in the folder fashion-mnist among the downloaded data, or fetched",
    ),
    "medmnist:<flag>": Reader(
        _medmnist,
        "any 2-D MedMNIST set, from <flag>.npz or <flag>_<size>.npz among the downloaded data, "
        "fetched if it is not there; read from the smallest published size that the size fits in",
        lambda name: name.startswith("medmnist:"),
    ),
    "covid19-xray": Reader(
        _covid19,
        "the folders Covid-19 and No_findings in covid19-xray among the downloaded data (Ozturk "
        "et al. 2020, Automated detection of COVID-19 cases using deep neural networks with X-ray "
        "images)",
    ),
    "a path to an .npz": Reader(
        _npz,
        "arrays in MedMNIST's layout, optionally with class_names, flip and provenance",
        lambda name: name.endswith(".npz"),
    ),
    "a path to an image folder": Reader(
        _folder,
        "a sub-folder a class, or train, val and test folders of those",
        lambda name: Path(name).is_dir(),
    ),
}
"""The sources by name, or by how their names look; the first that matches reads a name."""
