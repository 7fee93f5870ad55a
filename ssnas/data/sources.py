"""Where images come from: bundled, downloaded, or the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssnas.data.folders import Options, check_options, convert, read_folder
from ssnas.data.npz import published_splits, read_arrays
from ssnas.data.types import Dataset, Source
from ssnas.errors import InputError

ACCEPTED = (
    "digits, faces, cifar10, medmnist:<flag>, covid19-xray, a path to an .npz, a path to an image "
    "folder"
)
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
COVID19_CLASSES = ("Covid-19", "No_findings")
MEDMNIST_SIZES = (28, 64, 128, 224)
# A mirrored chest or abdomen shows the heart or the liver on the wrong side, which is a rare
# finding of its own (situs inversus), and organ*mnist tells left from right in its labels.
# Cells, tissue and skin have no such side, and a mirrored left eye or breast is a right one.
LATERAL = ("chestmnist", "pneumoniamnist", "organ")


class _Found(NamedTuple):
    """What a reader hands over; load completes it to a Source."""

    splits: dict[str, Dataset | None]
    flip: bool
    origin: str
    sha256: str
    notes: dict


def load(
    name: str,
    raw: Path,
    size: int | None = None,
    channels: str = "keep",
    bad_images: str = "error",
    flip: bool | None = None,
) -> Source:
    """Read a source of images.

    name: one of
    - `digits`: 1,797 grey 8 x 8 digits (scikit-learn), no published test set
    - `faces`: 100 faces and 100 non-faces, grey 25 x 25 (scikit-image), no published test set
    - `cifar10`: `cifar10.npz` in `raw` (arrays train_images, train_labels, test_images,
      test_labels, optionally the string provenance), or else the published archive, fetched
    - `medmnist:<flag>`: any 2-D MedMNIST set, from `<flag>.npz` or `<flag>_<size>.npz` in `raw`,
      fetched if it is not there; read from the smallest published size that `size` fits in
    - `covid19-xray`: the folders Covid-19 and No_findings in `raw`/covid19-xray (Ozturk et al.
      2020, "Automated detection of COVID-19 cases using deep neural networks with X-ray images")
    - a path to an `.npz` in MedMNIST's layout, optionally with class_names, flip, provenance
    - a path to an image folder: a sub-folder per class, or train, val, test folders of those
    raw: the folder of downloaded data.
    size: side of the square images in pixels, or None to keep theirs; the shorter side is
        resized to it (antialiased) and the centre cut out.
    channels: `keep`, `grey` or `rgb`.
    bad_images: `error`, or `skip` to leave unreadable files of a folder out, and record them.
    flip: whether horizontal flips are allowed, or None for what is known of the source.

    The provenance records source, origin, sha256 (of the file, of the files of a folder, or of
    the arrays), original_counts per split, image_size (H, W, C), classes, skipped, and any note.
    By themselves, sources allow horizontal flips but for digits and for images of the body's
    inside, where left and right differ; an .npz may say so itself by a boolean array `flip`.

    Raises InputError naming the key, file or class, what was found and what is accepted.
    """
    options = Options(size, channels, bad_images)
    check_options(options)
    found = _reader(name)(name, Path(raw), options)
    splits = {
        split: convert(data, options) for split, data in found.splits.items() if data is not None
    }
    train = splits["train"]
    provenance = {
        "source": name,
        "origin": found.origin,
        "sha256": found.sha256,
        "original_counts": {split: data.counts for split, data in splits.items()},
        "classes": list(train.class_names),
        "image_size": list(train.images.shape[1:]),
        "skipped": {"count": 0, "names": []},
        **found.notes,
    }
    flip = found.flip if flip is None else flip
    return Source(train, splits.get("val"), splits.get("test"), provenance, flip)


def _reader(name: str) -> Callable[[str, Path, Options], _Found]:
    if name in READERS:
        return READERS[name]
    if name.startswith("medmnist:"):
        return _medmnist
    if name.endswith(".npz"):
        return _npz
    if Path(name).is_dir():
        return _folder
    raise InputError(f"name: found {name!r}, which is no folder either; accepted: {ACCEPTED}")


def _digits(name: str, raw: Path, options: Options) -> _Found:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple(str(digit) for digit in bunch.target_names)
    dataset = Dataset(images, bunch.target.astype(np.int64), names)
    return _arrays({"train": dataset}, flip=False, origin="sklearn.datasets.load_digits")


def _faces(name: str, raw: Path, options: Options) -> _Found:
    from skimage.data import lfw_subset

    images = np.round(lfw_subset() * 255).astype(np.uint8)[..., None]
    labels = np.repeat(np.arange(2), 100)
    dataset = Dataset(images, labels, ("face", "non-face"))
    return _arrays({"train": dataset}, flip=True, origin="skimage.data.lfw_subset")


def _cifar10(name: str, raw: Path, options: Options) -> _Found:
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


def _medmnist(name: str, raw: Path, options: Options) -> _Found:
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
    found = _file(
        path,
        flip=not flag.startswith(LATERAL),
        class_names=info and tuple(info["label"].values()),
        multi_label=bool(info) and "multi-label" in info["task"],
    )
    images = sum(len(data) for data in found.splits.values() if data is not None)
    published = sum(info["n_samples"].values()) if info else images
    if images != published:
        found.notes["note"] = f"a sample of {images:,} images of the published {published:,}"
    return found


def _medmnist_info(flag: str) -> dict | None:
    """What the medmnist package knows of a 2-D set; None without the package."""
    try:
        from medmnist import INFO
    except ImportError:
        return None
    flags = [known for known in INFO if not known.endswith("3d")]
    if flag not in flags:
        raise InputError(f"name: found 'medmnist:{flag}'; accepted flags: {', '.join(flags)}")
    return INFO[flag]


def _fetch_medmnist(path: Path, info: dict | None, size: int) -> None:
    if info is None:
        raise InputError(
            f"{path}: not found; accepted: the file, or the package medmnist to fetch it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    import medmnist

    with _downloading(f"{path.name} in {path.parent}"):
        published = getattr(medmnist, info["python_class"])
        published(split="train", root=str(path.parent), download=True, size=size)


def _covid19(name: str, raw: Path, options: Options) -> _Found:
    folder = raw / name
    missing = [part for part in COVID19_CLASSES if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"{folder}: found no folder {' or '.join(missing)}; accepted: the images of Ozturk et "
            f"al. 2020 in the folders {' and '.join(COVID19_CLASSES)} there"
        )
    return _folder(str(folder), raw, options)._replace(flip=False)


def _npz(name: str, raw: Path, options: Options) -> _Found:
    return _file(Path(name), flip=True)


def _folder(name: str, raw: Path, options: Options) -> _Found:
    folder = read_folder(Path(name), options)
    skipped = {"count": len(folder.skipped), "names": folder.skipped}
    return _Found(folder.splits, True, name, folder.sha256, {"skipped": skipped})


def _file(
    path: Path,
    flip: bool,
    class_names: tuple[str, ...] | None = None,
    multi_label: bool = False,
) -> _Found:
    """An .npz in MedMNIST's layout, which may say its own provenance and flip."""
    arrays = read_arrays(path)
    splits = published_splits(path, arrays, class_names, multi_label)
    notes = {"provenance": str(arrays["provenance"])} if "provenance" in arrays else {}
    flip = bool(arrays["flip"].all()) if "flip" in arrays else flip
    return _Found(splits, flip, str(path), _file_sha256(path), notes)


def _arrays(splits: dict[str, Dataset], flip: bool, origin: str) -> _Found:
    digest = hashlib.sha256()
    for data in splits.values():
        digest.update(data.images.tobytes())
        digest.update(data.labels.tobytes())
    return _Found(splits, flip, origin, digest.hexdigest(), {})


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _downloading(instead: str) -> Iterator[None]:
    """Turn what failing downloads raise into an InputError that says which file to put where."""
    try:
        yield
    except (OSError, HTTPException, RuntimeError) as error:
        # urllib's URLError is an OSError; the packages' own messages run over many lines.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"download: failed ({reason}); put by hand: {instead}") from None


READERS = {
    "digits": _digits,
    "faces": _faces,
    "cifar10": _cifar10,
    "covid19-xray": _covid19,
}
