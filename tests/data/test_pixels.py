"""Pixels of images of every kind, against values that stand in the files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssnas.data.folders import DEEPEST, Options, decode, read_folder, white_level
from ssnas.errors import InputError

RNG = np.random.default_rng(0)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png16(array, significant_bits=None):
    """A 16-bit PNG written by hand: grey (H, W) or colour (H, W, 3)."""
    colour = 2 if array.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    rows = array.astype(">u2").reshape(len(array), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    declared = b""
    if significant_bits is not None:
        declared = chunk(b"sBIT", bytes([significant_bits] * (3 if colour else 1)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + declared
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path):
    """Write files into two classes; returns the folder's reader."""

    def write(*contents, suffix=".png", **options):
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            for i, content in enumerate(contents):
                (tmp_path / name / f"{i}{suffix}").write_bytes(content)
        return read_folder(tmp_path, Options(**options))

    return write


ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize(("orientation", "turned"), ORIENTATIONS.items())
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_exif_turns_images_upright(orientation, turned, kind):
    stored = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    picture = Image.fromarray(stored).convert("RGB" if kind == "webp" else "L")
    shown = decode(encoded(picture, kind, exif=exif, **options), depth=1)
    np.testing.assert_array_equal(shown[..., 0], turned(stored))


def test_cmyk_is_subtractive():
    """Cyan ink leaves green and blue; no ink is white; black ink is black."""
    inks = np.array([[[255, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    shown = decode(encoded(Image.fromarray(inks, "CMYK"), "tiff"))
    np.testing.assert_array_equal(shown, [[[0, 255, 255], [255, 255, 255], [0, 0, 0]]])


def test_a_palette_shows_its_colours():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    for kind in ("png", "gif", "bmp"):
        np.testing.assert_array_equal(
            decode(encoded(picture, kind)), [[[10, 20, 30], [200, 100, 50]]]
        )


def test_a_transparent_palette_entry_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    shown = decode(encoded(picture, "png", transparency=0))
    np.testing.assert_array_equal(shown, [[[255, 255, 255], [200, 100, 50]]])


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, [255]),
        ("L", 77, [77]),
        ("LA", (0, 51), [204]),  # black at a fifth, over white
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
    ],
)
def test_modes(mode, pixel, expected):
    np.testing.assert_array_equal(decode(encoded(Image.new(mode, (1, 1), pixel)))[0, 0], expected)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_the_depth_is_what_holds_the_largest_value_of_all_images(folder, bits):
    white = 2**bits - 1
    dark, bright = np.array([[0, white // 4]]), np.array([[white // 2, white]])
    read = folder(png16(dark), png16(bright))
    assert read.white_level == white
    shown = read.splits["train"].images[:2, 0, :, 0]
    expected = np.round(np.concatenate([dark, bright]) * 255 / white)
    np.testing.assert_array_equal(shown, expected)


def test_eight_bits_in_files_of_sixteen(folder):
    values = np.array([[0, 100, 255]])
    read = folder(png16(values))
    assert read.white_level == 255
    np.testing.assert_array_equal(read.splits["train"].images[0, 0, :, 0], values[0])


def test_a_png_declares_its_bits(folder):
    read = folder(png16(np.array([[0, 500]]), significant_bits=12))
    assert read.white_level == 4095
    np.testing.assert_array_equal(
        read.splits["train"].images[0, 0, :, 0], [0, round(500 * 255 / 4095)]
    )


def test_a_tiff_of_sixteen_bits(folder):
    values = np.array([[0, 2048, 4095]], np.uint16)
    read = folder(encoded(Image.fromarray(values), "tiff"), suffix=".tif")
    assert read.white_level == 4095
    np.testing.assert_array_equal(read.splits["train"].images[0, 0, :, 0], [0, 128, 255])


def test_a_pgm_is_scaled_by_its_own_maximum(folder):
    content = b"P5 2 1 4095\n" + struct.pack(">HH", 0, 2048)
    read = folder(content, suffix=".pgm")
    assert read.white_level == DEEPEST
    np.testing.assert_array_equal(read.splits["train"].images[0, 0, :, 0], [0, 128])


def test_the_white_level_can_be_set(folder):
    read = folder(png16(np.array([[0, 1000, 3000]])), white_level=2000)
    assert read.white_level == 2000
    np.testing.assert_array_equal(read.splits["train"].images[0, 0, :, 0], [0, 128, 255])


def test_images_of_eight_bits_have_no_white_level(folder):
    assert folder(encoded(Image.new("L", (4, 4), 9))).white_level is None


@pytest.mark.parametrize("white", [0, -1, 70000, 1.5, "x"])
def test_a_wrong_white_level_is_named(white):
    from ssnas.data.folders import check_options

    with pytest.raises(InputError, match="white_level"):
        check_options(Options(white_level=white))


def test_colour_of_sixteen_bits(tmp_path):
    bright, dark = tmp_path / "bright.png", tmp_path / "dark.png"
    bright.write_bytes(png16(np.full((2, 2, 3), 0xABCD)))
    dark.write_bytes(png16(np.full((2, 2, 3), 4095)))
    assert white_level([bright]) is None
    assert decode(bright.read_bytes())[0, 0].tolist() == [0xAB] * 3
    with pytest.raises(InputError, match=r"dark\.png.*16 bits.*4095.*colour of 8 bits"):
        white_level([bright, dark])


def test_floating_point_is_refused():
    picture = Image.fromarray(np.array([[0.5, 1.0]], np.float32))
    with pytest.raises(InputError, match="floating-point"):
        decode(encoded(picture, "tiff"))


@pytest.mark.parametrize("kind", ["tiff", "gif", "png", "webp"])
def test_several_pages_are_refused(kind):
    pages = [Image.new("L", (4, 4), 50 * i) for i in range(3)]
    with pytest.raises(InputError, match="found 3 pages or frames; accepted: one image"):
        decode(encoded(pages[0], kind, save_all=True, append_images=pages[1:]))


def test_the_limit_of_megapixels_is_named_and_can_be_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encoded(Image.new("1", (2000, 1000)))
    with pytest.raises(InputError, match=r"found 2 megapixels.*SSNAS_MAX_MEGAPIXELS"):
        decode(content)
    monkeypatch.setenv("SSNAS_MAX_MEGAPIXELS", "3")
    assert decode(content, sides=(4, 4)).shape == (4, 4, 1)
    monkeypatch.setenv("SSNAS_MAX_MEGAPIXELS", "many")
    with pytest.raises(InputError, match="SSNAS_MAX_MEGAPIXELS: found 'many'"):
        decode(content)
