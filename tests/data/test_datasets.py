"""Sources, splits and folds: every accepted form, every refusal, and what must always hold."""

import itertools
import json
import sys
import urllib.error
import zipfile

import numpy as np
import pytest
from PIL import Image
from skimage.data import lfw_subset
from sklearn.datasets import load_digits

from ssnas import data as datasets
from ssnas.data import Dataset, Source
from ssnas.errors import InputError

SPLIT = {
    "profile": "natural",
    "imbalance": 10,
    "largest_class": None,
    "val_fraction": 0.2,
    "test_fraction": 0.2,
    "seed": 0,
}


def numbered(counts, side=4, start=0):
    """Images that carry their own number in their first two pixels, shuffled."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(7).permutation(labels)
    images = np.zeros((len(labels), side, side, 1), np.uint8)
    numbers = np.arange(start, start + len(labels))
    images[:, 0, 0, 0], images[:, 0, 1, 0] = numbers // 256, numbers % 256
    return Dataset(images, labels, tuple(f"c{c}" for c in range(len(counts))))


def numbers_of(dataset):
    corner = dataset.images[:, 0, :2, 0].astype(int)
    return (corner[:, 0] * 256 + corner[:, 1]).tolist()


def source(train, val=None, test=None):
    return Source(train, val, test, {"source": "numbered"}, True)


def multi_label(n=40, start=0):
    base = numbered([n], start=start)
    labels = np.random.default_rng(3).integers(0, 2, (n, 3)).astype(np.uint8)
    return Dataset(base.images, labels, ("a", "b", "c"))


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def some_arrays(n=6, shape=(5, 5), classes=3):
    images = np.random.default_rng(0).integers(0, 256, (n, *shape)).astype(np.uint8)
    return {"train_images": images, "train_labels": np.arange(n)[:, None] % classes}


def save_image(path, colour=(200, 30, 90), size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def refused(call, *parts):
    """Assert that call() is refused in one line that contains every part."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


# --- the types


@pytest.mark.parametrize(
    ("images", "labels", "names", "parts"),
    [
        (np.zeros((2, 3, 3, 1)), np.zeros(2, int), "a", ("images", "float64", "uint8")),
        (np.zeros((2, 3, 3, 2), np.uint8), np.zeros(2, int), "a", ("images", "(2, 3, 3, 2)")),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, int), "a", ("labels", "3 for 2 images")),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([0, 2]), "ab", ("labels", "0 to 1")),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int32), "a", ("int32", "int64")),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros((2, 2), np.uint8), "abc", ("(2, 2)",)),
        (np.zeros((1, 3, 3, 1), np.uint8), np.full((1, 1), 2, np.uint8), "a", ("2", "0 and 1")),
    ],
)
def test_a_data_set_checks_itself(images, labels, names, parts):
    refused(lambda: Dataset(images, labels, tuple(names)), *parts)


def test_counts_and_take():
    single = numbered([3, 0, 2])
    assert (single.counts, single.num_classes, len(single)) == ([3, 0, 2], 3, 5)
    assert numbers_of(single.take(np.array([4, 1]))) == [4, 1]
    many = Dataset(np.zeros((3, 2, 2, 1), np.uint8), np.eye(3, dtype=np.uint8)[:, :2], ("x", "y"))
    assert (many.multi_label, many.counts, many.num_classes) == (True, [1, 1], 2)


# --- sources


def test_digits_are_scaled_and_not_flipped(tmp_path):
    found = datasets.load("digits", tmp_path)
    bunch = load_digits()
    assert found.train.images.shape == (1797, 8, 8, 1)
    assert found.train.counts == np.bincount(bunch.target).tolist()
    np.testing.assert_allclose(found.train.images[..., 0] / 255 * 16, bunch.images, atol=0.04)
    assert (found.val, found.test, found.flip) == (None, None, False)
    assert found.provenance["original_counts"] == {"train": found.train.counts}
    assert found.provenance["image_size"] == [8, 8, 1]


def test_a_flip_of_ones_own_takes_the_place_of_the_sources(tmp_path):
    for name, own in (("digits", False), ("faces", True)):
        found = [datasets.load(name, tmp_path, flip=flip).flip for flip in (None, False, True)]
        assert found == [own, False, True]


def test_faces_come_before_non_faces(tmp_path):
    found = datasets.load("faces", tmp_path)
    assert found.train.counts == [100, 100]
    assert found.train.class_names == ("face", "non-face")
    assert found.train.labels[[0, 99, 100, 199]].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found.train.images[..., 0] / 255, lfw_subset(), atol=0.003)
    assert found.flip


def test_array_sources_change_size_and_channels(tmp_path):
    grey = datasets.load("faces", tmp_path).train.images
    found = datasets.load("faces", tmp_path, size=16, channels="rgb").train.images
    assert found.shape == (200, 16, 16, 3)
    assert (found == found[..., :1]).all()
    # An antialiased resize keeps the mean brightness.
    np.testing.assert_allclose(found.mean((1, 2, 3)), grey.mean((1, 2, 3)), atol=4)


def test_cifar10_from_its_npz(tmp_path):
    arrays = some_arrays(shape=(32, 32, 3))
    save_npz(
        tmp_path / "cifar10.npz",
        **arrays,
        test_images=arrays["train_images"],
        test_labels=arrays["train_labels"],
        provenance="CIFAR-10, re-encoded",
    )
    found = datasets.load("cifar10", tmp_path)
    assert found.train.class_names[:2] == ("airplane", "automobile")
    assert found.train.counts == [2, 2, 2, 0, 0, 0, 0, 0, 0, 0]
    assert (found.test.images == arrays["train_images"]).all()
    assert found.val is None
    assert found.flip
    assert found.provenance["provenance"] == "CIFAR-10, re-encoded"
    assert len(found.provenance["sha256"]) == 64
    grey = datasets.load("cifar10", tmp_path, channels="grey").train.images
    luma = arrays["train_images"] @ [0.299, 0.587, 0.114]  # ITU-R 601
    np.testing.assert_allclose(grey[..., 0], luma, atol=1)


@pytest.mark.parametrize("error", [OSError, urllib.error.URLError, RuntimeError])
def test_a_failed_cifar10_download_says_what_to_put_where(tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    refused(
        lambda: datasets.load("cifar10", tmp_path),
        *("no network", "cifar-10-python.tar.gz or cifar10.npz", str(tmp_path)),
    )


def test_cifar10_from_the_published_archive(tmp_path, monkeypatch):
    class Published:
        url = "the archive"

        def __init__(self, root, train, download):
            assert download
            self.data = np.full((4 if train else 2, 32, 32, 3), 9, np.uint8)
            self.targets = [3] * len(self.data)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Published)
    found = datasets.load("cifar10", tmp_path)
    assert (len(found.train), len(found.test), found.train.counts[3]) == (4, 2, 4)
    assert found.provenance["origin"] == "the archive"


def chest(tmp_path, name="chestmnist.npz", side=28):
    labels = np.eye(14, dtype=np.uint8)[:6]
    images = np.zeros((6, side, side), np.uint8)
    pairs = {f"{s}_images": images for s in ("train", "val", "test")}
    save_npz(tmp_path / name, **pairs, **{key[:-6] + "labels": labels for key in pairs})


def test_chestmnist_is_multi_label_named_and_not_flipped(tmp_path):
    chest(tmp_path)
    found = datasets.load("medmnist:chestmnist", tmp_path)
    assert found.train.multi_label
    assert found.train.counts == [1] * 6 + [0] * 8
    assert (found.train.class_names[0], found.train.class_names[-1]) == ("atelectasis", "hernia")
    assert not found.flip
    assert found.provenance["note"] == "a sample of 18 images of the published 112,120"


@pytest.mark.parametrize(
    ("size", "name", "side", "expected"),
    [(None, "chestmnist", 28, 28), (20, "chestmnist", 28, 20), (64, "chestmnist_64", 64, 64)],
)
def test_medmnist_reads_the_smallest_size_that_suffices(tmp_path, size, name, side, expected):
    chest(tmp_path, f"{name}.npz", side)
    found = datasets.load("medmnist:chestmnist", tmp_path, size=size)
    assert found.train.images.shape[1:] == (expected, expected, 1)
    assert found.provenance["origin"].endswith(f"{name}.npz")


@pytest.mark.parametrize(
    ("flag", "flip"),
    [
        ("bloodmnist", True),
        ("breastmnist", True),
        ("pneumoniamnist", False),
        ("organcmnist", False),
    ],
)
def test_medmnist_flips_where_sides_do_not_matter(tmp_path, flag, flip):
    save_npz(tmp_path / f"{flag}.npz", **some_arrays(shape=(28, 28), classes=2))
    found = datasets.load(f"medmnist:{flag}", tmp_path)
    assert found.flip is flip
    assert not found.train.multi_label


def test_medmnist_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    chest(tmp_path)
    found = datasets.load("medmnist:chestmnist", tmp_path)
    assert found.train.class_names == tuple(str(label) for label in range(14))
    refused(
        lambda: datasets.load("medmnist:bloodmnist", tmp_path),
        *("bloodmnist.npz", "not found", "the package medmnist"),
    )


def test_medmnist_fetches_what_is_not_there(tmp_path, monkeypatch):
    raw = tmp_path / "raw"

    def fetch(split, root, download, size):
        assert (root, download) == (str(raw), True)
        save_npz(raw / f"bloodmnist_{size}.npz", **some_arrays(shape=(64, 64, 3)))

    monkeypatch.setattr("medmnist.BloodMNIST", fetch)
    assert datasets.load("medmnist:bloodmnist", raw, size=64).train.images.shape[1:] == (64, 64, 3)


def test_a_failed_medmnist_download_says_what_to_put_where(tmp_path, monkeypatch):
    def fail(**options):
        raise RuntimeError("\n   Automatic download failed!\n   1. Check")

    monkeypatch.setattr("medmnist.BloodMNIST", fail)
    refused(
        lambda: datasets.load("medmnist:bloodmnist", tmp_path, size=128),
        *("Automatic download failed!", f"bloodmnist_128.npz in {tmp_path}"),
    )


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("medmnist:catmnist", {}, ("medmnist:catmnist", "chestmnist")),
        ("medmnist:organmnist3d", {}, ("organmnist3d", "organsmnist")),
        ("medmnist:chestmnist", {"size": 256}, ("size", "256", "224")),
        ("cifar11", {}, ("cifar11", "digits", "cifar10", "medmnist:<flag>", "image folder")),
        ("digits", {"size": 0}, ("size", "0")),
        ("digits", {"size": 8.0}, ("size", "8.0")),
        ("digits", {"channels": "gray"}, ("channels", "'gray'", "keep, grey, rgb")),
        ("digits", {"bad_images": "drop"}, ("bad_images", "'drop'", "error, skip")),
        ("nowhere.npz", {}, ("nowhere.npz", "no such file", "train_images")),
    ],
)
def test_wrong_names_and_options_are_refused(tmp_path, name, options, parts):
    refused(lambda: datasets.load(name, tmp_path, **options), *parts)


def test_covid19_folder(tmp_path):
    refused(
        lambda: datasets.load("covid19-xray", tmp_path),
        *(f"{tmp_path / 'covid19-xray'}", "Covid-19 and No_findings"),
    )
    for part, grey in (("Covid-19", 50), ("No_findings", 90)):
        save_image(tmp_path / "covid19-xray" / part / "0.png", (grey,) * 3, (20, 20), "L")
    found = datasets.load("covid19-xray", tmp_path, size=10)
    assert found.train.images[:, 5, 5, 0].tolist() == [50, 90]
    assert found.train.class_names == ("Covid-19", "No_findings")
    assert not found.flip


# --- .npz files


def test_npz_with_all_splits_and_its_own_notes(tmp_path):
    arrays = some_arrays()
    path = save_npz(
        tmp_path / "own.npz",
        **arrays,
        val_images=arrays["train_images"][:3],
        val_labels=np.arange(3),
        class_names=np.array(["red", "green", "blue"]),
        flip=np.array(False),
    )
    found = datasets.load(path, tmp_path)
    assert found.train.images.shape == (6, 5, 5, 1)
    assert found.train.class_names == ("red", "green", "blue")
    assert (found.val.counts, found.test, found.flip) == ([1, 1, 1], None, False)


OBJECTS = np.array([{"a": 1}] * 6, dtype=object)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_images": np.zeros((6, 5, 5))}, ("train_images", "float64", "uint8")),
        ({"train_images": np.zeros((6, 5), np.uint8)}, ("train_images", "(6, 5)")),
        ({"train_images": OBJECTS}, ("train_images", "pickled objects")),
        ({"train_labels": OBJECTS}, ("train_labels", "pickled objects")),
        ({"train_labels": np.zeros(6)}, ("train_labels", "float64", "integers")),
        ({"train_labels": np.zeros(5, int)}, ("train_labels", "5 for 6 images")),
        ({"train_labels": np.zeros((6, 1, 1), int)}, ("train_labels", "(6, 1, 1)")),
        ({"train_labels": np.full((6, 2), 3)}, ("train_labels", "0 and 1")),
        ({"train_labels": np.full((6, 2), 256)}, ("train_labels", "0 and 1")),
        ({"train_labels": np.full(6, -1)}, ("train_labels", "-1")),
        ({"train_labels": np.full(6, 10**9)}, ("train_labels", "1000000000", "class_names")),
        ({"class_names": np.array(["only"])}, ("train_labels", "0 to 2")),
        ({"train_labels": None}, ("train_labels", "not found")),
        ({"train_labels": None, "train_images": None}, ("train_images", "not found")),
        ({"test_images": np.zeros((2, 5, 5), np.uint8)}, ("test_labels", "not found")),
        (
            {"val_images": np.zeros((2, 7, 7), np.uint8), "val_labels": np.zeros(2, int)},
            ("val_images", "(7, 7, 1)", "(5, 5, 1)"),
        ),
        (
            {"val_images": np.zeros((2, 5, 5), np.uint8), "val_labels": np.zeros((2, 4), int)},
            ("val_labels", "(4,)", "(1,)"),
        ),
    ],
)
def test_wrong_npz_arrays_are_named(tmp_path, change, parts):
    arrays = {key: a for key, a in {**some_arrays(), **change}.items() if a is not None}
    path = save_npz(tmp_path / "wrong.npz", **arrays)
    refused(lambda: datasets.load(path, tmp_path), "wrong.npz", *parts)


# --- image folders


def test_folder_of_every_mode_and_format(tmp_path):
    deep = np.full((12, 12), 40000, np.uint16)
    (tmp_path / "a").mkdir()
    Image.fromarray(deep).save(tmp_path / "a" / "deep.png")
    save_image(tmp_path / "a" / "palette.png", mode="P")
    save_image(tmp_path / "a" / "photo.JPG")
    save_image(tmp_path / "b" / "alpha.png", mode="RGBA")
    save_image(tmp_path / "b" / "grey.png", (77, 77, 77), mode="L")
    save_image(tmp_path / "b" / "nested" / "tif.tiff", mode="RGB")
    save_image(tmp_path / "b" / "._hidden.png")
    for ignored in (".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "a" / ignored).write_bytes(b"no image")
    (tmp_path / "__MACOSX").mkdir()

    found = datasets.load(str(tmp_path), tmp_path)
    assert found.train.class_names == ("a", "b")
    assert found.train.counts == [3, 3]
    assert found.train.images.shape == (6, 12, 12, 3)
    middle = found.train.images[:, 6, 6].astype(int)
    expected = [[156] * 3, [200, 30, 90], [200, 30, 90], [200, 30, 90], [77] * 3, [200, 30, 90]]
    # 40000 of 65535 is 155.6 of 255; palettes and JPEG are not exact.
    np.testing.assert_allclose(middle, expected, atol=26)
    assert middle[0].tolist() == [156] * 3
    assert middle[3].tolist() == [200, 30, 90]
    assert (found.val, found.test, found.flip) == (None, None, True)

    grey = datasets.load(str(tmp_path), tmp_path, channels="grey").train.images
    assert grey.shape[-1] == 1
    assert grey[4, 6, 6, 0] == 77


def test_folder_of_grey_images_stays_grey_unless_told(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        save_image(tmp_path / name, mode="L")
    assert datasets.load(str(tmp_path), tmp_path).train.images.shape[-1] == 1
    assert datasets.load(str(tmp_path), tmp_path, channels="rgb").train.images.shape[-1] == 3


def test_folder_with_published_splits(tmp_path):
    for split, n in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(n):
                save_image(tmp_path / split / name / f"{i}.png")
    found = datasets.load(str(tmp_path), tmp_path)
    assert [part.counts for part in (found.train, found.val, found.test)] == [
        [3, 3],
        [2, 2],
        [1, 1],
    ]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        save_image(tmp_path / name / "0.png")
    assert datasets.load(str(tmp_path), tmp_path).train.class_names == ("bus", "train")


def test_wide_images_lose_their_sides_not_their_shape(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(wide).save(tmp_path / name / "0.png")
    found = datasets.load(str(tmp_path), tmp_path, size=10).train.images
    assert found.shape == (2, 10, 10, 1)
    assert found.min() == 255


def test_relative_folders_start_at_the_working_directory(tmp_path, monkeypatch):
    for name in ("a", "b"):
        save_image(tmp_path / "mine" / name / "0.png")
    monkeypatch.chdir(tmp_path)
    assert datasets.load("mine", tmp_path / "raw").provenance["origin"] == "mine"


def test_different_sizes_need_a_size(tmp_path):
    save_image(tmp_path / "a" / "0.png", size=(8, 8))
    save_image(tmp_path / "b" / "0.png", size=(9, 7))
    refused(lambda: datasets.load(str(tmp_path), tmp_path), "size", "9 x 7", "8 x 8", "0.png")
    assert datasets.load(str(tmp_path), tmp_path, size=6).train.images.shape == (2, 6, 6, 3)


def broken_folder(tmp_path):
    for name in ("a/good.png", "b/good.png"):
        save_image(tmp_path / name, size=(64, 64))
    whole = (tmp_path / "a" / "good.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "text.jpg").write_bytes(b"not an image at all")


def test_unreadable_images_are_named_or_skipped(tmp_path):
    broken_folder(tmp_path)
    refused(lambda: datasets.load(str(tmp_path), tmp_path), "cut.png", "unreadable")
    (tmp_path / "a" / "cut.png").rename(tmp_path / "b" / "z.png")
    refused(lambda: datasets.load(str(tmp_path), tmp_path), "text.jpg", "no known image format")
    found = datasets.load(str(tmp_path), tmp_path, bad_images="skip")
    assert found.provenance["skipped"] == {"count": 2, "names": ["b/text.jpg", "b/z.png"]}
    assert found.train.counts == [1, 1]
    (tmp_path / "b" / "good.png").unlink()
    refused(
        lambda: datasets.load(str(tmp_path), tmp_path, bad_images="skip"),
        *(str(tmp_path / "b"), "no readable image"),
    )


@pytest.mark.parametrize(
    "values",
    [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)],
)
def test_pixels_without_a_known_range_are_refused(tmp_path, values):
    save_image(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    Image.fromarray(values).save(tmp_path / "b" / "0.tif")
    refused(lambda: datasets.load(str(tmp_path), tmp_path), "0.tif", "accepted")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["0.png"], ("0 class folders", "2 or more")),
        (["a/0.png"], ("1 class folders", "2 or more")),
        (["a/0.png", "b/notes.txt"], ("b: found no image", ".png")),
        (["train/a/0.png", "train/b/0.png", "more/a/0.png"], ("more beside train", "validation")),
        (
            ["Train/a/0.png", "Train/b/0.png", "training/a/0.png"],
            ("Train and training, both for train",),
        ),
        (
            ["a/one/0.png", "a/two/0.png", "b/one/0.png", "b/two/0.png"],
            ("one, two within each of a, b", "one folder a class"),
        ),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png"],
            ("test: found classes a;", "those of train, a, b"),
        ),
    ],
)
def test_wrong_folders_are_named(tmp_path, files, parts):
    for name in files:
        if name.endswith(".png"):
            save_image(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    refused(lambda: datasets.load(str(tmp_path), tmp_path), *parts)


def test_the_checksum_follows_the_content(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / name / "0.png")
    first, again = (datasets.load(str(tmp_path), tmp_path).provenance["sha256"] for _ in "12")
    save_image(tmp_path / "b" / "0.png", (1, 2, 3))
    assert first == again
    assert first != datasets.load(str(tmp_path), tmp_path).provenance["sha256"]


# --- splits


def test_splits_are_disjoint_long_tailed_and_complete():
    pool = numbered([100, 90, 80])
    made = datasets.split(source(pool), **{**SPLIT, "profile": "exponential", "imbalance": 4})
    # Held out for test: 20, 18, 16. The smallest class of the rest has 64: 64, 32, 16.
    assert made.test.counts == [20, 18, 16]
    assert made.provenance["counts_before"] == [80, 72, 64]
    assert made.val.counts == [13, 6, 3]
    assert made.train.counts == [51, 26, 13]
    parts = [numbers_of(part) for part in (made.train, made.val, made.test)]
    everything = [*itertools.chain(*parts)]
    assert len(everything) == len(set(everything)) == 64 + 32 + 16 + 54
    for part, numbers in zip((made.train, made.val, made.test), parts, strict=True):
        assert (part.labels == pool.labels[numbers]).all()
    assert made.provenance["counts"] == {
        "train": [51, 26, 13],
        "val": [13, 6, 3],
        "test": [20, 18, 16],
    }
    assert made.provenance["source"] == "numbered"
    json.dumps(made.provenance)


def test_natural_keeps_every_image():
    made = datasets.split(source(numbered([30, 10])), **SPLIT)
    assert sum(len(part) for part in (made.train, made.val, made.test)) == 40
    assert made.provenance["imbalance"] is None


def test_published_splits_stay_as_they_are():
    val, test = numbered([4, 4], start=300), numbered([5, 3], start=400)
    published = source(numbered([50, 40]), val, test)
    made = datasets.split(published, **{**SPLIT, "profile": "step", "imbalance": 8})
    assert made.val is val
    assert made.test is test
    assert made.train.counts == [40, 5]
    made = datasets.split(published, **SPLIT)
    assert numbers_of(made.train) == list(range(90))


def test_published_test_without_validation():
    test = numbered([5, 3], start=400)
    made = datasets.split(source(numbered([50, 40]), None, test), **SPLIT)
    assert made.test is test
    assert (made.train.counts, made.val.counts) == ([40, 32], [10, 8])


def test_largest_class_caps_the_profile():
    options = {**SPLIT, "profile": "exponential", "imbalance": 2, "largest_class": 20}
    made = datasets.split(source(numbered([100, 90])), **options)
    assert np.add(made.train.counts, made.val.counts).tolist() == [20, 10]
    made = datasets.split(source(numbered([50, 40])), **{**options, "largest_class": 10**6})
    assert np.add(made.train.counts, made.val.counts).tolist() == [32, 16]


def test_the_seed_decides():
    pool = source(numbered([60, 60]))
    first, same, other = (datasets.split(pool, **{**SPLIT, "seed": s}) for s in (0, 0, 1))
    for part in ("train", "val", "test"):
        drawn, again, differently = (numbers_of(getattr(s, part)) for s in (first, same, other))
        assert drawn == again
        assert drawn != differently


def test_one_test_set_serves_every_profile():
    pool = source(numbered([60, 60]))
    natural, step = (datasets.split(pool, **{**SPLIT, "profile": p}) for p in ("natural", "step"))
    assert numbers_of(natural.test) == numbers_of(step.test)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_every_class_keeps_an_image_on_each_side(fraction):
    options = {**SPLIT, "val_fraction": fraction, "test_fraction": fraction}
    made = datasets.split(source(numbered([3, 30])), **options)
    assert min(made.train.counts + made.val.counts + made.test.counts) >= 1


def test_multi_label_splits():
    pool = multi_label(40)
    made = datasets.split(source(pool), **SPLIT)
    assert made.provenance["images"] == {"train": 26, "val": 6, "test": 8}
    parts = [numbers_of(part) for part in (made.train, made.val, made.test)]
    assert sorted(itertools.chain(*parts)) == list(range(40))
    assert (made.val.labels == pool.labels[parts[1]]).all()


@pytest.mark.parametrize(
    ("made_of", "change", "parts"),
    [
        (numbered([9, 9]), {"profile": "flat"}, ("profile", "'flat'", "natural, exponential")),
        (numbered([9, 9]), {"largest_class": 5}, ("largest_class", "5", "natural")),
        (numbered([9, 9]), {"largest_class": 0, "profile": "step"}, ("largest_class", "0")),
        (numbered([9, 9]), {"imbalance": 0, "profile": "step"}, ("imbalance", "0")),
        (numbered([9, 9]), {"val_fraction": 0}, ("val_fraction", "0", "0.5")),
        (numbered([9, 9]), {"val_fraction": 0.6}, ("val_fraction", "0.6")),
        (numbered([9, 9]), {"test_fraction": 0.51}, ("test_fraction", "0.51")),
        (numbered([9, 9]), {"test_fraction": "half"}, ("test_fraction", "'half'")),
        (numbered([9, 9]), {"seed": -1}, ("seed", "-1")),
        (numbered([9, 1]), {}, ("class 'c1'", "1 images", "test")),
        (numbered([9, 2]), {}, ("class 'c1'", "1 images", "validation")),
        (numbered([9, 0]), {}, ("class 'c1'", "0 images")),
        (numbered([9, 9]), {"profile": "step", "imbalance": 100}, ("class 'c1'", "0 images")),
        (multi_label(), {"profile": "step"}, ("profile", "'step'", "multi-label", "natural")),
    ],
)
def test_impossible_splits_are_named(made_of, change, parts):
    refused(lambda: datasets.split(source(made_of), **{**SPLIT, **change}), *parts)


# --- files of splits


@pytest.mark.parametrize("pool", [numbered([20, 20]), multi_label()], ids=["single", "multi"])
def test_written_splits_come_back(tmp_path, pool):
    made = datasets.split(source(pool), **SPLIT)
    path = tmp_path / "new" / "splits.npz"
    datasets.write(made, path)
    back = datasets.read(path)
    for part in ("train", "val", "test"):
        before, after = getattr(made, part), getattr(back, part)
        np.testing.assert_array_equal(before.images, after.images)
        np.testing.assert_array_equal(before.labels, after.labels)
        assert before.labels.dtype == after.labels.dtype
        assert before.class_names == after.class_names
    assert (back.provenance, back.flip) == (made.provenance, made.flip)
    assert [file.name for file in path.parent.iterdir()] == ["splits.npz"]


def test_equal_splits_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        made = datasets.split(source(numbered([20, 20])), **SPLIT)
        datasets.write(made, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with zipfile.ZipFile(tmp_path / "one") as file:  # no time of writing in it
        assert {info.date_time[0] for info in file.infolist()} == {1980}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    made = datasets.split(source(numbered([20, 20])), **SPLIT)
    path = tmp_path / "splits.npz"
    datasets.write(made, path)
    whole = path.read_bytes()

    def fail(file, arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ssnas.data.splits.write_npz", fail)
    with pytest.raises(InputError, match=r"splits\.npz: cannot be written \(disk full"):
        datasets.write(made, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["splits.npz"]


def test_files_that_are_no_splits_are_refused(tmp_path):
    made = datasets.split(source(numbered([20, 20])), **SPLIT)
    path = tmp_path / "splits.npz"
    datasets.write(made, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(lambda: datasets.read(path), "splits.npz", "damaged")
    # One byte flipped inside the compressed images: the directory is whole, the checksum is not.
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    refused(lambda: datasets.read(path), "splits.npz")
    path.write_text("no zip")
    refused(lambda: datasets.read(path), "splits.npz", "damaged file or no .npz")
    refused(
        lambda: datasets.read(tmp_path / "absent.npz"),
        "absent.npz: not found; `dvc repro` makes it",
    )
    save_npz(path, **some_arrays())
    refused(lambda: datasets.read(path), "splits.npz", "test_images", "provenance", "not found")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("provenance", np.array([{}], dtype=object), ("provenance", "pickled objects")),
        ("provenance", np.array("CIFAR-10"), ("provenance", "no JSON")),
        ("test_labels", np.zeros(1, int), ("test_labels", "1 for 8 images")),
    ],
)
def test_spoiled_splits_are_refused(tmp_path, key, value, parts):
    path = tmp_path / "splits.npz"
    datasets.write(datasets.split(source(numbered([20, 20])), **SPLIT), path)
    with np.load(path) as file:
        arrays = {**file, key: value}
    save_npz(path, **arrays)
    refused(lambda: datasets.read(path), "splits.npz", *parts)


# --- folds


@pytest.mark.parametrize("data", [numbered([23, 11, 5]), multi_label(17)], ids=["single", "multi"])
def test_folds_are_a_partition(data):
    cut = datasets.folds(data, 5, 0)
    assert len(cut) == 5
    assert sorted(np.concatenate([test for _, test in cut])) == list(range(len(data)))
    for train, test in cut:
        assert sorted([*train, *test]) == list(range(len(data)))
    sizes = [len(test) for _, test in cut]
    assert max(sizes) - min(sizes) <= 1


def test_folds_are_stratified_and_seeded():
    data = numbered([23, 11, 5])
    counts = np.array([data.take(test).counts for _, test in datasets.folds(data, 5, 0)])
    assert (np.ptp(counts, axis=0) <= 1).all()
    first, same, other = ([t.tolist() for _, t in datasets.folds(data, 5, s)] for s in (0, 0, 1))
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("data", "k", "seed", "parts"),
    [
        (numbered([9, 4]), 5, 0, ("k", "5 folds", "'c1'", "4 images")),
        (multi_label(4), 5, 0, ("5 folds", "4 images")),
        (numbered([9, 4]), 1, 0, ("k", "1", "from 2 up")),
        (numbered([9, 4]), 2, -1, ("seed", "-1")),
    ],
)
def test_impossible_folds_are_named(data, k, seed, parts):
    refused(lambda: datasets.folds(data, k, seed), *parts)


def test_splits_without_test_images(tmp_path):
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2
    source = Source(Dataset(images, labels, ("cat", "dog")), None, None, {}, True)
    options = {"profile": "natural", "imbalance": 1.0, "largest_class": None, "seed": 0}
    splits = datasets.split(source, val_fraction=0.2, test_fraction=0.0, **options)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 0)
    datasets.write(splits, tmp_path / "splits.npz")
    again = datasets.read(tmp_path / "splits.npz")
    assert len(again.test) == 0
    np.testing.assert_array_equal(again.train.labels, splits.train.labels)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"train_labels": np.zeros(6, int)}, ("train_labels", "1 class;", "2 or more")),
        ({"train_labels": np.arange(6) % 2 + 1}, ("labels from 1 to 2", "from 0")),
        ({"class_names": ["a", "b", "a"], "train_labels": np.arange(6) % 3}, ("a more than once",)),
        ({"train_labels": np.eye(3, dtype=int)[np.arange(6) % 3]}, ("exactly one 1", "argmax")),
        ({"train_images": np.zeros((6, 0, 8), np.uint8)}, ("train_images", "(6, 0, 8, 1)")),
    ],
)
def test_arrays_that_would_mislead_are_refused(tmp_path, arrays, parts):
    whole = {"train_images": np.zeros((6, 8, 8), np.uint8), "train_labels": np.arange(6) % 2}
    np.savez(tmp_path / "mine.npz", **(whole | arrays))
    refused(lambda: datasets.load(str(tmp_path / "mine.npz"), tmp_path), "mine.npz", *parts)
