"""Folders as people have them: system folders, links, odd names, and what is no image."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ssnas import data as datasets
from ssnas.data.folders import decode
from ssnas.data.listing import SPLIT_NAMES, image_files, list_folder
from ssnas.errors import InputError


def save(path, value=100, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path, **options)
    return path


def names(listing, folder):
    return [file.path.relative_to(folder).as_posix() for file in listing.files]


@pytest.mark.parametrize(
    "system",
    [
        ".ipynb_checkpoints",
        "@eaDir",
        "__MACOSX",
        ".git",
        "$RECYCLE.BIN",
        "System Volume Information",
    ],
)
def test_hidden_and_system_folders_count_nowhere(tmp_path, system):
    for place in ("", "a", "a/deep", "b"):
        save(tmp_path / place / system / "copy.png")
    for name in ("a/0.png", "a/deep/1.png", "b/0.png"):
        save(tmp_path / name)
    for name in ("a/Thumbs.db", "a/desktop.ini", "b/.DS_Store", "b/._0.png"):
        (tmp_path / name).write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert names(listing, tmp_path) == ["a/0.png", "a/deep/1.png", "b/0.png"]
    assert listing.class_names == ("a", "b")
    assert listing.ignored == []


@pytest.mark.parametrize(
    "spelling", [("Training", "Testing"), ("TRAIN", "Test", "Valid"), ("train", "dev"),
                 ("train", "validation", "testing"), ("Train", "eval")],
)  # fmt: skip
def test_splits_by_the_names_of_common_tools(tmp_path, spelling):
    for folder in spelling:
        for name in ("a", "b"):
            save(tmp_path / folder / name / "0.png")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("a", "b")
    assert {file.split for file in listing.files} == {SPLIT_NAMES[n.lower()] for n in spelling}
    assert [file.split for file in listing.files][:2] == ["train", "train"]


def test_classes_may_be_called_like_splits(tmp_path):
    for name in ("train", "car"):
        save(tmp_path / name / "0.png")
    assert list_folder(tmp_path).class_names == ("car", "train")


def test_images_are_known_by_their_content(tmp_path):
    save(tmp_path / "a/0.png")
    save(tmp_path / "b/0.jfif", format="jpeg")
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/no extension")
    shutil.copy(tmp_path / "a/0.png", tmp_path / "a/0.dcm")
    (tmp_path / "a/labels.csv").write_text("0,1")
    (tmp_path / "b/empty").touch()
    listing = list_folder(tmp_path)
    assert names(listing, tmp_path) == ["a/0.dcm", "a/0.png", "a/no extension", "b/0.jfif"]
    assert listing.ignored == ["a/labels.csv", "b/empty"]
    provenance = datasets.load(str(tmp_path), tmp_path).provenance
    assert provenance["ignored"] == {"count": 2, "names": ["a/labels.csv", "b/empty"]}


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "a/0.png")
    save(tmp_path / "b/0.png")
    save(tmp_path.with_name("elsewhere") / "1.png")
    (tmp_path / "a" / "linked").symlink_to(tmp_path.with_name("elsewhere"), True)
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a", True)
    (tmp_path / "b" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_folder(tmp_path)
    assert names(listing, tmp_path) == ["a/0.png", "a/linked/1.png", "b/0.png"]
    assert listing.ignored == ["a/circle", "b/broken.png"]


def test_transparent_pixels_show_white(tmp_path):
    """Whatever colour hides below them."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[0, 0, 3], pixels[0, 1, 3], pixels[1, :, 3] = 255, 128, 0
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    read = decode((tmp_path / "rgba.png").read_bytes())
    assert read[0, 0].tolist() == [200, 0, 0]
    assert read[1, 0].tolist() == read[1, 1].tolist() == [255, 255, 255]
    half = 128 / 255
    expected = [200 * half + 255 * (1 - half), 255 * (1 - half), 255 * (1 - half)]
    assert np.abs(read[0, 1] - np.array(expected)).max() < 1.5


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=1)
    read = decode((tmp_path / "p.png").read_bytes())
    assert read[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("name", ["pages.tif", "moving.gif", "moving.webp"])
def test_several_pages_are_refused(tmp_path, name):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with pytest.raises(InputError, match="found 2 pages or frames; accepted: one image a file"):
        decode((tmp_path / name).read_bytes())


def test_predictions_find_images_as_training_does(tmp_path):
    save(tmp_path / "deep/0.png")
    save(tmp_path / "@eaDir/0.png")
    (tmp_path / "notes.txt").write_text("x")
    assert image_files(tmp_path) == [tmp_path / "deep/0.png"]
