"""Image files: their sizes and modes, and folders of them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ssnas.data.listing import EXTENSIONS, File, list_folder, name_in
from ssnas.data.longtail import is_integer
from ssnas.data.types import SPLITS, Dataset
from ssnas.errors import InputError
from ssnas.runtime.mapped import CHUNK, chunks, release, scratch

CHANNELS: dict[str, int | None] = {"keep": None, "grey": 1, "rgb": 3}
"""The channels that images are converted to; None keeps the images' own."""


def _refuse(path: Path, reason: InputError) -> None:
    raise InputError(f"{path}: {reason}")


def _skip(path: Path, reason: InputError) -> None:
    """Leave the image out."""


BAD_IMAGES: dict[str, Callable[[Path, InputError], None]] = {"error": _refuse, "skip": _skip}
"""What to do with an unreadable image; those that are left out are recorded."""

GREY_MODES = ("1", "L", "LA", "La")
BIT_DEPTHS = (8, 10, 12, 14, 16)
DEEPEST = 65535
"""The value of white in images whose bits are not known to be fewer than 16."""

BITS_PER_SAMPLE = 258
"""The tag of TIFF."""

EIGHT_BITS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".webp")
"""Kinds of files that never have more."""

MAX_MEGAPIXELS = "SSNAS_MAX_MEGAPIXELS"
READ_AHEAD = 256
THREADS = 4


class Options(NamedTuple):
    """The way to read images.

    Attributes:
        size: the side of the square images in pixels; None keeps their size.
        channels: a key of `CHANNELS`.
        bad_images: a key of `BAD_IMAGES`.
        white_level: the value that is white in images of more than 8 bits; None for what the files
            say or hold, see `white_level`.
    """

    size: int | None = None
    channels: str = "keep"
    bad_images: str = "error"
    white_level: int | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width; None where images keep theirs."""
        return None if self.size is None else (self.size, self.size)


class Folder(NamedTuple):
    """The content of an image folder.

    Attributes:
        splits: the data sets by split, None for a val or test that is not there.
        sha256: a checksum of the names and contents of all image files.
        white_level: the value that was taken for white in images of more than 8 bits; None where
            all have 8.
        skipped: the unreadable images that were left out, relative to the folder.
        ignored: the files that are no images, see `ssnas.data.listing.Listing`.
        linked: the links on the way to images, likewise.
    """

    splits: dict[str, Dataset | None]
    sha256: str
    white_level: int | None
    skipped: list[str]
    ignored: list[str]
    linked: list[str]


def check_options(options: Options) -> None:
    """Check the options.

    Raises:
        InputError: naming `size`, `channels`, `bad_images` or `white_level`.
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
    white = options.white_level
    if white is not None and not (is_integer(white, 1) and white <= DEEPEST):
        raise InputError(f"white_level: found {white!r}; accepted: null or 1 to {DEEPEST}")


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
    images = scratch((len(dataset), *sides, target_depth))
    for part in chunks(images):
        for i in range(part.start, part.stop):
            images[i] = pixels(as_image(dataset.images[i]), target_depth, sides)
        release(dataset.images)
    return dataclasses.replace(dataset, images=images)


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
    image: Image.Image,
    depth: int | None = None,
    sides: tuple[int, int] | None = None,
    white: int = DEEPEST,
) -> np.ndarray:
    """Convert an image of any mode to an array.

    With other sides than its own, it is resized until it covers them (bicubic, antialiased) and
    the centre cut out. Grey of more than 8 bits is scaled so that `white` becomes 255; what is
    transparent shows white.

    Args:
        depth: C, 1 for grey and 3 for colour; None for what the image is.
        sides: height and width in pixels; None for the image's own.
        white: the value that is white in an image of more than 8 bits; what is above it is white
            too.

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
        image = _eight_bits(image, white)
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


def _eight_bits(image: Image.Image, white: int) -> Image.Image:
    deep = np.asarray(image).astype(np.int64)
    if deep.min() < 0 or deep.max() > DEEPEST:
        raise InputError(f"found integers beyond 16 bits; accepted: 0 to {DEEPEST}")
    return Image.fromarray(np.round(np.minimum(deep, white) * 255 / white).astype(np.uint8))


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
    files, class_names, ignored, linked = list_folder(folder)
    read = read_images(folder, files, options)
    _check_every_class(files, read.kept)
    splits = {
        split: _gather(folder, split, read.kept, read.images, class_names) for split in SPLITS
    }
    return Folder(splits, read.sha256, read.white_level, read.skipped, ignored, linked)


class Images(NamedTuple):
    """The images of files, in their order.

    Attributes:
        kept: the files that could be read.
        images: uint8 (N, H, W, C), of these files.
        sha256: of the names and contents of all files.
        white_level: the value that was taken for white in deep images.
        skipped: the names of the files that could not be read.
    """

    kept: list[File]
    images: np.ndarray
    sha256: str
    white_level: int | None
    skipped: list[str]


def read_images(folder: Path, files: list[File], options: Options) -> Images:
    """Read image files; all come out in one size and with one number of channels.

    Args:
        folder: that names are relative to.

    Raises:
        InputError: naming the file, for an unreadable image (unless `bad_images` is `skip`), or
            images of different sizes where no `size` is set.
    """
    if options.white_level is None:
        options = options._replace(white_level=white_level([file.path for file in files]))
    digest = hashlib.sha256()
    kept: list[File] = []
    skipped: list[str] = []
    images = _Stack(len(files))
    for file, content_hash, result in _read_all(files, options):
        name = name_in(folder, file.path)
        digest.update(f"{name}\0{content_hash}\n".encode())
        if isinstance(result, InputError):
            BAD_IMAGES[options.bad_images](file.path, result)
            skipped.append(name)
            continue
        if kept and result.shape[:2] != images.sides:
            raise InputError(
                f"size: found null, but {file.path} is {_sides(result.shape[:2])} and "
                f"{kept[0].path} is {_sides(images.sides)}; accepted: pixels, an integer"
            )
        kept.append(file)
        images.add(result)
    return Images(kept, images.all, digest.hexdigest(), options.white_level, skipped)


class _Stack:
    """Images of one size, put together one by one; in colour from the first that is."""

    def __init__(self, count: int) -> None:
        self.count, self.filled, self.unreleased = count, 0, 0
        self.images = np.empty((0, 0, 0, 1), np.uint8)

    @property
    def all(self) -> np.ndarray:
        return self.images[: self.filled]

    @property
    def sides(self) -> tuple[int, int]:
        height, width = self.images.shape[1:3]
        return height, width

    def add(self, image: np.ndarray) -> None:
        if not self.filled or image.shape[2] > self.images.shape[3]:
            wider = scratch((self.count, *image.shape))
            for part in chunks(self.all):
                wider[part] = self.images[part]
                release(wider)
            self.images = wider
        self.images[self.filled] = image
        self.filled += 1
        self.unreleased += image.nbytes
        if self.unreleased > CHUNK:
            release(self.images)
            self.unreleased = 0


def _sides(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def white_level(paths: Sequence[Path]) -> int | None:
    """Find the value that is white in images of more than 8 bits.

    Scanners and cameras keep 10, 12 or 14 bits in files of 16. All images of a data set are read
    alike: their white is 2^b − 1, where b is the smallest of 8, 10, 12, 14 and 16 that has room for
    what the files declare (PNG's sBIT, TIFF's BitsPerSample) and for the largest value of all.

    Returns:
        The value; None where no image has more than 8 bits.

    Raises:
        InputError: for colour of 16 bits that is so dark that its upper 8 bits, which are all that
            is read of it, hold next to nothing.
    """
    deep = [path for path in paths if path.suffix.lower() not in EIGHT_BITS]
    with ThreadPoolExecutor(THREADS) as pool:
        bits = [found for found in pool.map(_bits, deep) if found is not None]
    if not bits:
        return None
    return 2 ** next(b for b in BIT_DEPTHS if b >= min(max(bits), BIT_DEPTHS[-1])) - 1


def _bits(path: Path) -> int | None:
    """Count the bits that an image declares and uses, if it has more than 8."""
    try:
        with Image.open(path) as image:
            if _is_deep_colour(image):
                _check_deep_colour(path, image)
            if not image.mode.startswith("I"):
                return None
            used = int(np.asarray(image).max()).bit_length()
            return max(used, _declared_bits(path, image))
    except InputError:
        raise
    except Exception:  # what is wrong with it, reading it says
        return None


def _declared_bits(path: Path, image: Image.Image) -> int:
    if image.format == "PPM":  # Pillow has scaled it to 16 bits
        return 16
    if image.format == "TIFF":
        samples = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 0)
        declared = max(samples) if isinstance(samples, tuple) else int(samples)
        return declared if declared < 16 else 0
    if image.format == "PNG":
        with path.open("rb") as file:
            head = file.read(256)
        place = head.find(b"sBIT")
        return head[place + 4] if 0 < place < len(head) - 4 else 0
    return 0


def _is_deep_colour(image: Image.Image) -> bool:
    raw = [tile[3] for tile in getattr(image, "tile", ())]
    return any("16" in str(mode) for mode in raw) and image.mode in ("RGB", "RGBA", "LA")


def _check_deep_colour(path: Path, image: Image.Image) -> None:
    brightest = int(np.asarray(image)[..., : len(image.getbands())].max())
    if brightest < 2**6:
        raise InputError(
            f"{path}: found colour of 16 bits with values up to {256 * brightest + 255}, of which "
            "only the upper 8 bits can be read; accepted: colour of 8 bits"
        )


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
        white = options.white_level or DEEPEST
        result = decode(content, CHANNELS[options.channels], options.sides, white)
    except OSError as error:
        result = InputError(f"found an unreadable file ({error.strerror}); accepted: whole images")
    except InputError as error:
        result = error
    return hashlib.sha256(content).hexdigest(), result


def decode(
    content: bytes,
    depth: int | None = None,
    sides: tuple[int, int] | None = None,
    white: int = DEEPEST,
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
    _set_pixel_limit()
    try:
        with Image.open(io.BytesIO(content)) as image:
            frames = getattr(image, "n_frames", 1)
            # Cameras write a preview behind the photograph (MPO).
            if frames > 1 and image.format != "MPO":
                raise InputError(f"found {frames} pages or frames; accepted: one image a file")
            return pixels(ImageOps.exif_transpose(image), depth, sides, white)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        size = re.search(r"\((\d+) pixels\)", str(error))
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise InputError(
            f"found {int(size[1]) / 1e6:.0f} megapixels; accepted: up to {limit:.0f}, or what the "
            f"environment variable {MAX_MEGAPIXELS} says; or make the image smaller"
            if size
            else f"found an image that is too large ({error})"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"found no known image format; accepted: {' '.join(EXTENSIONS)}") from None
    except Exception as error:  # on broken files Pillow's decoders raise far more than OSError
        reason = " ".join(str(error).split())
        raise InputError(f"found an unreadable image ({reason}); accepted: whole images") from None


def _set_pixel_limit() -> None:
    """Let the user raise Pillow's limit, which guards against files that unpack to all memory."""
    text = os.environ.get(MAX_MEGAPIXELS)
    if text is None:
        return
    try:
        Image.MAX_IMAGE_PIXELS = int(float(text) * 1e6)  # from twice as many on it refuses
    except (ValueError, OverflowError):
        raise InputError(
            f"{MAX_MEGAPIXELS}: found {text!r}; accepted: a number of megapixels"
        ) from None


def _check_every_class(files: list[File], kept: list[File]) -> None:
    lost = {file[:2] for file in files} - {file[:2] for file in kept}
    for file in files:
        if file[:2] in lost:
            raise InputError(
                f"{file.path.parent}: found no readable image; accepted: at least 1 in each class"
            )


def _gather(
    folder: Path,
    split: str,
    files: list[File],
    images: np.ndarray,
    class_names: tuple[str, ...],
) -> Dataset | None:
    """Pick the images of one split, which lie next to each other."""
    chosen = [i for i, file in enumerate(files) if file.split == split]
    if not chosen:
        return None
    part = slice(chosen[0], chosen[-1] + 1)
    labels = np.array([file.label for file in files[part]], dtype=np.int64)
    names = [name_in(folder, file.path) for file in files[part]]
    return Dataset(images[part], labels, class_names, ids=np.array(names, dtype=object))
