"""Image files: their sizes and modes, and folders of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ssnas.data.listing import EXTENSIONS, File, list_folder
from ssnas.data.longtail import is_integer
from ssnas.data.types import SPLITS, Dataset
from ssnas.errors import InputError

CHANNELS: dict[str, int | None] = {"keep": None, "grey": 1, "rgb": 3}
"""The channels that images are converted to; None keeps the images' own."""


def _refuse(path: Path, reason: InputError) -> None:
    raise InputError(f"{path}: {reason}")


def _skip(path: Path, reason: InputError) -> None:
    """Leave the image out."""


BAD_IMAGES: dict[str, Callable[[Path, InputError], None]] = {"error": _refuse, "skip": _skip}
"""What to do with an unreadable image; those that are left out are recorded."""

GREY_MODES = ("1", "L", "LA", "La")
READ_AHEAD = 256
THREADS = 4


class Options(NamedTuple):
    """The way to read images.

    Attributes:
        size: the side of the square images in pixels; None keeps their size.
        channels: a key of `CHANNELS`.
        bad_images: a key of `BAD_IMAGES`.
    """

    size: int | None = None
    channels: str = "keep"
    bad_images: str = "error"

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width; None where images keep theirs."""
        return None if self.size is None else (self.size, self.size)


class Folder(NamedTuple):
    """The content of an image folder.

    Attributes:
        splits: the data sets by split, None for a val or test that is not there.
        sha256: a checksum of the names and contents of all image files.
        skipped: the unreadable images that were left out, relative to the folder.
        ignored: the files that are no images, see `ssnas.data.listing.Listing`.
    """

    splits: dict[str, Dataset | None]
    sha256: str
    skipped: list[str]
    ignored: list[str]


def check_options(options: Options) -> None:
    """Check the options.

    Raises:
        InputError: naming `size`, `channels` or `bad_images`.
    """
    if options.size is not None and not is_integer(options.size, 1):
        raise InputError(
            f"size: found {options.size!r}; accepted: null or pixels, an integer from 1 up"
        )
    if options.channels not in CHANNELS:
        raise InputError(f"channels: found {options.channels!r}; accepted: {', '.join(CHANNELS)}")
    if options.bad_images not in BAD_IMAGES:
        raise InputError(
            f"bad_images: found {options.bad_images!r}; accepted: {', '.join(BAD_IMAGES)}"
        )


def convert(dataset: Dataset, options: Options) -> Dataset:
    """Bring the images of a data set to the size and channels that the options ask for.

    Example:
        >>> data = Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.arange(2), ("cat", "dog"))
        >>> convert(data, Options(size=4, channels="rgb")).images.shape
        (2, 4, 4, 3)
    """
    height, width, depth = dataset.images.shape[1:]
    sides = options.sides or (height, width)
    target_depth = CHANNELS[options.channels] or depth
    if (height, width, depth) == (*sides, target_depth):
        return dataset
    images = np.stack([pixels(as_image(image), target_depth, sides) for image in dataset.images])
    return Dataset(images, dataset.labels, dataset.class_names)


def as_image(array: np.ndarray) -> Image.Image:
    """Make an image of a uint8 array (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        InputError: for another array.

    Example:
        >>> as_image(np.zeros((8, 12, 1), np.uint8)).size
        (12, 8)
    """
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise InputError(
            f"image: found {array.dtype} {array.shape}; accepted: uint8 (H, W), (H, W, 1) or "
            "(H, W, 3)"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if grey else array)


def pixels(
    image: Image.Image, depth: int | None = None, sides: tuple[int, int] | None = None
) -> np.ndarray:
    """Convert an image of any mode to an array.

    With other sides than its own, it is resized until it covers them (bicubic, antialiased) and
    the centre cut out. 16-bit grey is scaled over its full range, 65535 to 255; what is transparent
    shows white.

    Args:
        depth: C, 1 for grey and 3 for colour; None for what the image is.
        sides: height and width in pixels; None for the image's own.

    Returns:
        uint8 (H, W, C).

    Raises:
        InputError: for pixels of a range that is not known.

    Example:
        >>> pixels(Image.new("RGB", (12, 8)), sides=(6, 6)).shape
        (6, 6, 3)
        >>> pixels(Image.new("L", (12, 8))).shape
        (8, 12, 1)
    """
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode == "F":
        raise InputError("found 32-bit floating-point pixels; accepted: 8-bit or 16-bit integers")
    depth = depth or (1 if image.mode in GREY_MODES else 3)
    if image.has_transparency_data:
        # Below transparent pixels any colour may hide.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if depth == 1 else "RGB")
    if sides is not None and image.size != sides[::-1]:
        image = ImageOps.fit(image, sides[::-1], Image.Resampling.BICUBIC)
    array = np.array(image)
    return array[..., None] if depth == 1 else array


def _eight_bits(image: Image.Image) -> Image.Image:
    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > 65535:
        raise InputError("found integers beyond 16 bits; accepted: 0 to 65535")
    return Image.fromarray(np.round(deep / 257).astype(np.uint8))


def read_folder(folder: Path, options: Options) -> Folder:
    """Read a folder of one sub-folder a class, or of train, val and test folders of those.

    val and test are optional, and may have any name of `ssnas.data.listing.SPLIT_NAMES`. Images may
    have any size and mode; hidden and system files are left out, and what is no image is listed.
    All images come out in one size and with one number of channels: in colour, if any image is.

    Raises:
        InputError: naming the file or folder, for a class without images, fewer than two classes,
            classes that differ between splits, an unreadable image (unless `bad_images` is
            `skip`), or images of different sizes where no `size` is set.
    """
    files, class_names, ignored = list_folder(folder)
    digest = hashlib.sha256()
    kept: list[File] = []
    arrays: list[np.ndarray] = []
    skipped: list[str] = []
    for file, content_hash, result in _read_all(files, options):
        name = file.path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{content_hash}\n".encode())
        if isinstance(result, InputError):
            BAD_IMAGES[options.bad_images](file.path, result)
            skipped.append(name)
            continue
        if arrays and result.shape[:2] != arrays[0].shape[:2]:
            raise InputError(
                f"size: found null, but {file.path} is {_sides(result)} and "
                f"{kept[0].path} is {_sides(arrays[0])}; accepted: pixels, an integer"
            )
        kept.append(file)
        arrays.append(result)
    _check_every_class(files, kept)
    colour = any(array.shape[-1] == 3 for array in arrays)
    splits = {split: _gather(split, kept, arrays, colour, class_names) for split in SPLITS}
    return Folder(splits, digest.hexdigest(), skipped, ignored)


def _sides(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def _read_all(
    files: list[File], options: Options
) -> Iterator[tuple[File, str, np.ndarray | InputError]]:
    """Yield each file with its checksum and its pixels, or the reason why it has none."""
    with ThreadPoolExecutor(THREADS) as pool:
        # In batches, so that little is read in vain if an early image stops the reading.
        for start in range(0, len(files), READ_AHEAD):
            batch = files[start : start + READ_AHEAD]
            results = pool.map(lambda file: _read_one(file.path, options), batch)
            for file, (content_hash, result) in zip(batch, results, strict=True):
                yield file, content_hash, result


def _read_one(path: Path, options: Options) -> tuple[str, np.ndarray | InputError]:
    content = b""
    result: np.ndarray | InputError
    try:
        content = path.read_bytes()
        result = decode(content, CHANNELS[options.channels], options.sides)
    except OSError as error:
        result = InputError(f"found an unreadable file ({error.strerror}); accepted: whole images")
    except InputError as error:
        result = error
    return hashlib.sha256(content).hexdigest(), result


def decode(
    content: bytes, depth: int | None = None, sides: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode an image file, turned upright by its EXIF data, to an array as `pixels` makes it.

    Raises:
        InputError: if it is no whole image.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (12, 8)).save(file, "png")
        >>> decode(file.getvalue(), depth=1, sides=(4, 4)).shape
        (4, 4, 1)
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            # Cameras write a preview behind the photograph (MPO).
            if frames > 1 and image.format != "MPO":
                raise InputError(f"found {frames} pages or frames; accepted: one image a file")
            return pixels(ImageOps.exif_transpose(image), depth, sides)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"found no known image format; accepted: {' '.join(EXTENSIONS)}") from None
    except Exception as error:  # on broken files Pillow's decoders raise far more than OSError
        reason = " ".join(str(error).split())
        raise InputError(f"found an unreadable image ({reason}); accepted: whole images") from None


def _check_every_class(files: list[File], kept: list[File]) -> None:
    lost = {file[:2] for file in files} - {file[:2] for file in kept}
    for file in files:
        if file[:2] in lost:
            raise InputError(
                f"{file.path.parent}: found no readable image; accepted: at least 1 in each class"
            )


def _gather(
    split: str,
    files: list[File],
    arrays: list[np.ndarray],
    colour: bool,
    class_names: tuple[str, ...],
) -> Dataset | None:
    chosen = [i for i, file in enumerate(files) if file.split == split]
    if not chosen:
        return None
    shape = (*arrays[0].shape[:2], 3 if colour else 1)
    images = np.stack([np.broadcast_to(arrays[i], shape) for i in chosen])
    labels = np.array([files[i].label for i in chosen], dtype=np.int64)
    return Dataset(images, labels, class_names)
