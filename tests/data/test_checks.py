"""What is odd about images is said, and what is not is not."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from ssnas.data import Dataset, Source, load, split
from ssnas.data.checks import oddities
from ssnas.data.types import Splits


def photo(seed, side=48):
    """A part of a photograph, another one for each seed."""
    row, column = divmod(seed * 7 % 400, 20)
    return astronaut()[20 * row : 20 * row + side, 20 * column : 20 * column + side].copy()


def recoded(image, quality=60):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def dataset(images, labels=None, names=("a", "b"), **more):
    labels = np.arange(len(images)) % 2 if labels is None else np.asarray(labels)
    return Dataset(np.stack(images), labels, names, **more)


def splits(train, val=None, test=None):
    val = val or dataset([photo(s) for s in (101, 102)])
    test = test or dataset([photo(s) for s in (201, 202)])
    return Splits(train, val, test, {}, True)


TRAIN = [photo(s) for s in range(12)]


def test_nothing_odd():
    assert oddities(splits(dataset(TRAIN))) == []


@pytest.mark.parametrize("name", ["digits", "faces"])
def test_published_sets_have_nothing_odd_that_is_not_there(name, tmp_path):
    made = split(
        load(name, tmp_path), profile="natural", imbalance=1, largest_class=None,
        val_fraction=0.1, test_fraction=0.2, seed=0,
    )  # fmt: skip
    # One of the non-faces is a patch of one grey.
    assert len(oddities(made)) == (name == "faces")


def test_a_leaked_image_is_named():
    ids = np.array(["a/x.png", "b/y.png"], dtype=object)
    test = dataset([recoded(TRAIN[7]), TRAIN[3]], ids=ids)
    assert oddities(splits(dataset(TRAIN), test=test)) == [
        "1 test image is also a training image (b/y.png)",
        "1 test image is nearly a training image (a/x.png)",
    ]


def test_an_image_leaked_from_validation_to_test():
    val, test = dataset([photo(50), photo(51)]), dataset([photo(51), photo(52)])
    assert "1 test image is also a validation image (0)" in oddities(
        splits(dataset(TRAIN), val, test)
    )


@pytest.mark.parametrize("quality", [40, 75, 95])
def test_a_leaked_image_that_was_encoded_again_is_named(quality):
    test = dataset([recoded(TRAIN[3], quality), photo(99)])
    assert oddities(splits(dataset(TRAIN), test=test)) == [
        "1 test image is nearly a training image (0)"
    ]


def test_repeats_and_contradictions():
    train = dataset([*TRAIN, TRAIN[0], TRAIN[1], TRAIN[1]], labels=[0, 1] * 6 + [0, 0, 1])
    lines = oddities(splits(train))
    assert any(line.startswith("3 training images") and "repeat" in line for line in lines)
    assert any(line.startswith("1 training image") and "another label" in line for line in lines)


def test_all_alike():
    lines = oddities(splits(dataset([TRAIN[0]] * 12)))
    assert lines == ["all training images are the same"]


def test_constant_images():
    flat = np.full((48, 48, 3), 7, np.uint8)
    assert oddities(splits(dataset([*TRAIN, flat]))) == [
        "1 training image has one colour throughout (12)"
    ]


def test_classes_that_a_split_lacks_and_small_ones():
    train = dataset([photo(s) for s in range(20)], labels=[0] * 18 + [1] * 2)
    val = dataset([photo(100), photo(101)], labels=[0, 0])
    assert oddities(splits(train, val)) == [
        "the validation images have none of class 'b'",
        "class 'b' has 2 training images",
    ]


def test_labels_of_several():
    labels = np.zeros((12, 2), np.uint8)
    labels[:8, 0] = 1
    train = Dataset(np.stack(TRAIN), labels, ("x", "y"))
    held = [Dataset(np.stack([photo(s)] * 1), labels[:1], ("x", "y")) for s in (70, 71)]
    assert "the training images have none of label 'y'" in oddities(splits(train, *held))


def test_groups_in_two_splits():
    train = dataset(TRAIN, groups=np.arange(12))
    test = dataset([photo(80), photo(81)], groups=np.array([3, 40]))
    assert "1 group has images among the test and the training images" in oddities(
        splits(train, test=test)
    )


def test_published_splits_of_different_images_only():
    source = Source(dataset(TRAIN), None, dataset([photo(60), photo(61)]), {}, True)
    made = split(
        source, profile="natural", imbalance=1, largest_class=None, val_fraction=0.2,
        test_fraction=0.2, seed=0,
    )  # fmt: skip
    assert not any("also" in line for line in oddities(made))
