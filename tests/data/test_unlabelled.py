"""Images without labels: where they come from, and that the search alone sees them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssnas.config.load import load_options
from ssnas.data.folders import Options
from ssnas.data.splits import read, split, write
from ssnas.data.types import Dataset, Source
from ssnas.data.unlabelled import read_unlabelled
from ssnas.errors import InputError
from ssnas.pipeline.search import images_of

CPU = torch.device("cpu")


def numbered(count=120, classes=3):
    """Images whose pixels are their number, so that each can be told."""
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    labels = np.arange(count) % classes
    return Dataset(pixels, labels, tuple(f"c{c}" for c in range(classes)))


def numbers(images):
    return images[:, 0, 0, 0].tolist()


def few(fraction, **changes):
    options = {"profile": "natural", "imbalance": 1.0, "largest_class": None, "seed": 0}
    options |= {"val_fraction": 0.1, "test_fraction": 0.2, "labelled_fraction": fraction}
    return split(Source(numbered(), None, None, {}, False), **(options | changes))


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.7])
def test_every_image_is_in_one_place(fraction):
    splits = few(fraction)
    places = splits.train.images, splits.val.images, splits.test.images, splits.unlabelled
    assert sorted(n for images in places for n in numbers(images)) == list(range(120))
    assert numbers(splits.test.images) == numbers(few(1.0).test.images)
    labelled = len(splits.train) + len(splits.val)
    assert labelled == pytest.approx(max(fraction * 96, 6), abs=2)
    assert min(splits.train.counts) >= 1 <= min(splits.val.counts)
    assert splits.provenance["unlabelled_images"] == 96 - labelled


def test_all_labels_leave_everything_as_it_was():
    whole = few(1.0)
    assert whole.unlabelled is None
    assert len(whole.train) + len(whole.val) == 96


def test_multi_label_images_are_drawn_from_all():
    data = numbered()
    labels = np.stack([data.labels == 0, data.labels > 0], axis=1).astype(np.uint8)
    source = Source(Dataset(data.images, labels, ("a", "b")), None, None, {}, False)
    splits = split(
        source,
        profile="natural",
        imbalance=1.0,
        largest_class=None,
        val_fraction=0.1,
        test_fraction=0.2,
        seed=0,
        labelled_fraction=0.5,
    )
    assert len(splits.unlabelled) == 48


def test_unlabelled_images_are_kept_in_the_file_of_splits(tmp_path):
    splits = few(0.25)
    write(splits, tmp_path / "splits.npz")
    assert numbers(read(tmp_path / "splits.npz").unlabelled) == numbers(splits.unlabelled)
    write(few(1.0), tmp_path / "all.npz")
    assert read(tmp_path / "all.npz").unlabelled is None


@pytest.fixture
def folder(tmp_path):
    """Two colour images of other sizes, one of them in a sub-folder, and a text."""
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png")):
        Image.new("RGB", (12 + number, 10), (100 + number,) * 3).save(tmp_path / "more" / name)
    (tmp_path / "more" / "notes.txt").write_text("no image")
    return tmp_path / "more"


def test_a_folder_of_any_images_comes_out_like_the_labelled_ones(folder):
    images = read_unlabelled(str(folder), numbered(), Options())
    assert images.shape == (2, 8, 8, 1)
    assert numbers(images) == [100, 101]


def test_an_array_of_an_npz(tmp_path):
    path = tmp_path / "more.npz"
    np.savez(path, pool=np.full((5, 16, 16), 7, np.uint8), other=np.zeros(3))
    images = read_unlabelled(f"{path}:pool", numbered(), Options())
    assert images.shape == (5, 8, 8, 1)
    assert set(numbers(images)) == {7}
    with pytest.raises(InputError, match=r"more\.npz: pol: not found; choose from pool, other"):
        read_unlabelled(f"{path}:pol", numbered(), Options())
    with pytest.raises(InputError, match=r"more\.npz: other: found float64"):
        read_unlabelled(f"{path}:other", numbered(), Options())


@pytest.mark.parametrize("name", ["nowhere", "photos.zip", ""])
def test_what_is_no_place_of_images_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="unlabelled"):
        read_unlabelled(name, numbered(), Options())


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="unlabelled: found no image"):
        read_unlabelled(str(tmp_path), numbered(), Options())


def test_the_search_sees_labelled_and_unlabelled_images_and_no_label():
    splits = few(0.25)
    run = load_options({"dataset": "digits"}, None, Path())
    images = images_of(run, splits, CPU)
    assert images.labels is None
    every = numbers(splits.train.images) + numbers(splits.unlabelled)
    assert images.pixels[:, 0, 0, 0].tolist() == every


def test_a_search_by_labels_sees_the_labelled_images_alone():
    splits = few(0.25)
    run = load_options({"dataset": "digits", "search": "supervised"}, None, Path())
    images = images_of(run, splits, CPU)
    assert len(images.pixels) == len(images.labels) == len(splits.train)
    alone = dataclasses.replace(splits, unlabelled=None)
    assert images.pixels.equal(images_of(run, alone, CPU).pixels)
