"""Groups: read from names and tables, and never torn apart by a split or a fold."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssnas.data import Dataset, Source, folds, load, read, split, write
from ssnas.data.groups import folds_of_groups, hold_out_groups, numbered, read_groups
from ssnas.data.sources import COVID19_GROUPS
from ssnas.errors import InputError

NAMES = ["cat/p1_1.png", "cat/p1_2.png", "dog/p2_1.png", "dog/scan.png"]


def grouped(n=120, groups=30, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    labels = (group + (rng.random(n) < 0.1)) % classes
    images = np.zeros((n, 4, 4, 1), np.uint8)
    images[:, 0, 0, 0] = group
    return Dataset(images, labels, tuple(f"c{c}" for c in range(classes)), group)


def disjoint(*parts):
    sets = [set(part.groups.tolist()) for part in parts]
    return sum(map(len, sets)) == len(set().union(*sets))


def test_a_rule_on_names():
    assert read_groups(r"(p\d+)_", NAMES).tolist() == ["p1", "p1", "p2", "dog/scan.png"]


@pytest.mark.parametrize("form", ["{}", "name"])
def test_a_table(tmp_path, form):
    images = NAMES if form == "{}" else [name.split("/")[1] for name in NAMES]
    path = tmp_path / "groups.csv"
    path.write_text("image,group\n" + "".join(f"{n},{i // 2}\n" for i, n in enumerate(images)))
    assert read_groups(str(path), NAMES).tolist() == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("(p", ["regular expression"]),
        (r"p\d", ["parentheses"]),
        ("(x)", ["matches no file name", "p1_1.png"]),
        ("nowhere.csv", ["nowhere.csv", "cannot be read"]),
    ],
)
def test_a_wrong_rule_is_named(rule, words):
    with pytest.raises(InputError) as error:
        read_groups(rule, NAMES)
    assert all(word in str(error.value) for word in ["groups", *words])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,patient\na,b\n", ["no column image or group"]),
        ("image,group\np1_1.png,1\n", ["3 of 4 images", "cat/p1_2.png"]),
        ("", ["no column"]),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, words):
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_groups(str(tmp_path / "g.csv"), NAMES)
    assert all(word in str(error.value) for word in ["g.csv", *words])


@pytest.mark.parametrize("profile", ["natural", "exponential"])
@pytest.mark.parametrize("seed", range(5))
def test_splits_keep_groups_together(profile, seed):
    made = split(
        Source(grouped(seed=seed), None, None, {}, True),
        profile=profile, imbalance=3, largest_class=None, val_fraction=0.2, test_fraction=0.2,
        seed=seed,
    )  # fmt: skip
    assert disjoint(made.train, made.val, made.test)
    for part in (made.train, made.val, made.test):
        assert min(part.counts) > 0
        np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.groups)
    assert made.provenance["groups"]["test"] == len(set(made.test.groups.tolist()))
    if profile == "natural":
        assert 0.1 < len(made.test) / 120 < 0.3


@settings(max_examples=60)
@given(st.data())
def test_held_out_groups_are_whole_and_every_class_is_on_both_sides(data):
    n, g = data.draw(st.integers(4, 60)), data.draw(st.integers(2, 12))
    classes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    groups = np.array(data.draw(st.lists(st.integers(0, g), min_size=n, max_size=n)))
    fraction = data.draw(st.floats(0.05, 0.5))
    names = ["a", "b", "c"]
    try:
        held = hold_out_groups(classes, groups, names, fraction, np.random.default_rng(0), "test")
    except InputError as error:
        assert "accepted" in str(error)
        return
    assert not set(groups[held]) & set(groups[~held])
    for c in range(3):
        assert (classes[held] == c).any() and (classes[~held] == c).any()


def test_folds_keep_groups_together():
    data = grouped()
    parts = folds(data, 4, seed=0)
    assert sorted(np.concatenate([test for _, test in parts]).tolist()) == list(range(len(data)))
    for train, test in parts:
        assert disjoint(data.take(train), data.take(test))
        assert min(data.take(test).counts) > 0
    assert [t.tolist() for _, t in folds(data, 4, 0)] == [t.tolist() for _, t in parts]


def test_too_few_groups_are_named():
    with pytest.raises(InputError, match="5 folds for 2 groups"):
        folds_of_groups(np.arange(8) % 2, np.arange(8) // 4, 5, 0)
    data = Dataset(
        np.zeros((4, 4, 4, 1), np.uint8), np.arange(4) // 2, ("a", "b"), np.arange(4) // 2
    )
    with pytest.raises(InputError, match="class 'a': found images of 1 groups"):
        split(
            Source(data, None, None, {}, True), profile="natural", imbalance=1, largest_class=None,
            val_fraction=0.2, test_fraction=0.2, seed=0,
        )  # fmt: skip


def test_groups_are_written_and_read(tmp_path):
    made = split(
        Source(grouped(), None, None, {}, True), profile="natural", imbalance=1,
        largest_class=None, val_fraction=0.2, test_fraction=0.2, seed=0,
    )  # fmt: skip
    write(made, tmp_path / "splits.npz")
    back = read(tmp_path / "splits.npz")
    assert disjoint(back.train, back.val, back.test)
    assert len(set(back.test.groups.tolist())) == made.provenance["groups"]["test"]


def test_groups_of_an_npz(tmp_path):
    names = np.array([f"patient {i // 4}" for i in range(40)])
    np.savez(
        tmp_path / "mine.npz", train_images=np.zeros((40, 4, 4), np.uint8),
        train_labels=np.arange(40) % 2, train_groups=names,
    )  # fmt: skip
    train = load(str(tmp_path / "mine.npz"), tmp_path).train
    assert len(set(train.groups.tolist())) == 10
    np.savez(
        tmp_path / "mine.npz", train_images=np.zeros((40, 4, 4), np.uint8),
        train_labels=np.arange(40) % 2, train_groups=names[:3],
    )  # fmt: skip
    with pytest.raises(InputError, match="train_groups"):
        load(str(tmp_path / "mine.npz"), tmp_path)


def test_groups_of_a_folder(tmp_path):
    for name in ("a/p1_0", "a/p1_1", "b/p2_0", "b/p1_2"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    train = load(str(tmp_path), Path("raw"), groups=r"(p\d)_").train
    assert train.groups.tolist() == [0, 0, 0, 1]
    assert train.ids.tolist() == ["a/p1_0.png", "a/p1_1.png", "b/p1_2.png", "b/p2_0.png"]
    with pytest.raises(InputError, match="no file names"):
        load("digits", Path("raw"), groups=r"(p\d)_")


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("00000013_005.png", "00000013"),
        ("nejmoa2001191_f3-PA.jpeg", "nejmoa2001191"),
        ("1-s2.0-S1684118220300608-main.pdf-002.jpg", "1-s2.0-S1684118220300608-main.pdf"),
        ("covid-19-pneumonia-22-day1-pa.png", "covid-19-pneumonia-22"),
        ("499.jpg", "x/499.jpg"),
    ],
)
def test_patients_in_the_names_of_published_x_rays(name, patient):
    other = "x/00000001_000.png"
    assert read_groups(COVID19_GROUPS, [f"x/{name}", other]).tolist()[0] == patient


def test_numbers_are_shared_between_splits():
    train, none, test = numbered([np.array(["x", "y"]), None, np.array(["y"])])
    assert none is None and test[0] == train[1] != train[0]
