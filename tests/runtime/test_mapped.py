"""Arrays in files: the same values as in memory, and no more memory than is touched."""

import io
import mmap
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssnas.data import Dataset, Source, load, read, split, write
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.runtime import mapped
from ssnas.runtime.mapped import chunks, read_npz, release, scratch, spread, taken, write_npz


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(mapped, "LARGE", 1)
    monkeypatch.setattr(mapped, "CHUNK", 50)


def is_mapped(array):
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base is not None


IMAGES = np.random.default_rng(0).integers(0, 256, (60, 5, 4, 3), dtype=np.uint8)
LABELS = np.arange(60) % 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_arrays_of_an_npz_are_mapped(tmp_path, everything_is_large, save):
    save(tmp_path / "a.npz", train_images=IMAGES, train_labels=LABELS, names=np.array(["x", "yy"]))
    arrays = read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(arrays["train_images"], IMAGES)
    np.testing.assert_array_equal(arrays["train_labels"], LABELS)
    assert arrays["names"].tolist() == ["x", "yy"]
    assert is_mapped(arrays["train_images"])


def test_a_damaged_large_array_is_found(tmp_path, everything_is_large):
    path = tmp_path / "a.npz"
    np.savez(path, a=IMAGES)
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, zlib.error)):
        read_npz(path)


def test_splits_beyond_the_memory_are_those_within(tmp_path, monkeypatch):
    data = Dataset(IMAGES, LABELS, ("a", "b", "c"))
    settings_ = {
        "profile": "exponential", "imbalance": 2, "largest_class": None, "val_fraction": 0.2,
        "test_fraction": 0.2, "seed": 0,
    }  # fmt: skip
    inside = split(Source(data, None, None, {}, True), **settings_)
    write(inside, tmp_path / "inside.npz")
    monkeypatch.setattr(mapped, "LARGE", 1)
    monkeypatch.setattr(mapped, "CHUNK", 50)
    np.savez(tmp_path / "raw.npz", train_images=IMAGES, train_labels=LABELS)
    source = load(str(tmp_path / "raw.npz"), tmp_path)
    made = split(Source(source.train, None, None, {}, True), **settings_)
    assert is_mapped(made.train.images)
    write(made, tmp_path / "outside.npz")
    back = read(tmp_path / "outside.npz")
    assert is_mapped(back.train.images)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(back, part).images, getattr(inside, part).images)
        np.testing.assert_array_equal(getattr(back, part).labels, getattr(inside, part).labels)
    assert Normalise.of(back.train.images) == Normalise.of(inside.train.images)


def test_released_pages_are_read_again(tmp_path, everything_is_large):
    copy = taken(IMAGES, np.arange(60)[::-1])
    assert is_mapped(copy)
    release(copy)
    np.testing.assert_array_equal(copy, IMAGES[::-1])
    copy[3] = 7
    release(copy)
    assert (copy[3] == 7).all()


def test_no_room_is_one_line(monkeypatch, everything_is_large):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_reserve", full)
    with pytest.raises(InputError, match=r"no room for .* GiB of images .No space.*TMPDIR"):
        scratch((10, 10))


@settings(max_examples=80)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        hnp.arrays(
            st.sampled_from(["u1", "i8", "f4", "b1", "U3", "S2"]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        ),
    )
)
def test_what_is_written_is_what_numpy_and_we_read(arrays):
    file = io.BytesIO()
    write_npz(file, arrays)
    again = io.BytesIO()
    write_npz(again, arrays)
    assert file.getvalue() == again.getvalue()
    file.seek(0)
    with np.load(file) as theirs:
        for name, array in arrays.items():
            assert theirs[name].dtype == array.dtype and theirs[name].shape == array.shape
            np.testing.assert_array_equal(theirs[name], array)


@pytest.mark.parametrize("array", [np.asfortranarray(IMAGES), np.array("text"), np.zeros((0, 3))])
def test_orders_and_shapes(tmp_path, array):
    np.savez(tmp_path / "a.npz", a=array)
    back = read_npz(tmp_path / "a.npz")["a"]
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype and back.shape == array.shape


def test_chunks_cover_all():
    array = np.zeros((10, 7), np.uint8)
    parts = list(chunks(array, 20))
    assert [part.stop - part.start for part in parts] == [2, 2, 2, 2, 2]
    assert list(chunks(array[:0])) == []
    assert len(list(chunks(array, 1))) == 10


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (3, 10), (0, 5), (7, 7)])
def test_spread_is_even(count, limit):
    chosen = spread(count, limit)
    assert len(chosen) == min(count, limit) == len(set(chosen.tolist()))
    assert all(0 <= i < count for i in chosen)
