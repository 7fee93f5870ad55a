"""The list of bad inputs: each ends with status 1 and one line, and leaves nothing behind."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.faults.conftest import PARAMS, arrays


def picture(path, value=0, mode="L", side=8, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), value).save(path, **options)


def classes(folder, names=("a", "b"), count=6, start=0):
    for k, name in enumerate(names):
        for i in range(count):
            picture(folder / name / f"{i}.png", (start + 37 * i + 90 * k) % 256)


def header_claims(shape):
    """An .npy whose header claims another shape than it has."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(64)


def npz_of(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


IMAGES = arrays()["train_images"]
LABELS = arrays()["train_labels"]
ARRAYS = {
    "one class": ({"train_labels": 0 * LABELS}, ["train_labels", "1 class"]),
    "labels from one": ({"train_labels": LABELS + 1}, ["train_labels", "from 0"]),
    "labels far apart": ({"train_labels": LABELS * 1000}, ["train_labels", "large gaps"]),
    "negative labels": ({"train_labels": LABELS - 1}, ["train_labels", "-1"]),
    "labels as floats": ({"train_labels": LABELS / 2}, ["train_labels", "float64"]),
    "labels as text": ({"train_labels": LABELS.astype(str)}, ["train_labels", "<U"]),
    "too few labels": ({"train_labels": LABELS[:5]}, ["labels", "5 for 60"]),
    "one-hot": ({"train_labels": np.eye(3, dtype=int)[LABELS]}, ["exactly one 1", "argmax"]),
    "labels of a cube": ({"train_labels": LABELS.reshape(3, 4, 5)}, ["train_labels", "(3, 4, 5)"]),
    "no labels": ({"train_labels": None}, ["train_labels", "not found"]),
    "no images": ({"train_images": None}, ["train_images", "not found"]),
    "images as floats": ({"train_images": IMAGES / 255}, ["train_images", "float64", "uint8"]),
    "images of no height": ({"train_images": IMAGES[:, :0]}, ["train_images", "(60, 0, 8"]),
    "images of four channels": (
        {"train_images": np.zeros((60, 8, 8, 4), np.uint8)}, ["train_images", "C 1 or 3"],
    ),
    "no image at all": (
        {"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, ["train_labels", "at least 1"],
    ),
    "a name twice": ({"class_names": np.array(["x", "y", "x"])}, ["class_names", "more than once"]),
    "too few names": ({"class_names": np.array(["x", "y"])}, ["labels", "0 to 1"]),
    "flip as text": ({"flip": np.array("false")}, ["flip", "boolean"]),
    "two flips": ({"flip": np.array([True, False])}, ["flip", "one boolean"]),
    "other test sizes": (
        {"test_images": np.zeros((9, 4, 4), np.uint8), "test_labels": LABELS[:9]},
        ["test_images", "(4, 4, 1)"],
    ),
    "test images alone": ({"test_images": IMAGES[:9]}, ["test_labels", "not found"]),
    "groups too few": ({"train_groups": LABELS[:5]}, ["train_groups", "60 images"]),
    "groups as floats": ({"train_groups": LABELS / 3}, ["train_groups", "float64"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(project, name):
    changes, words = ARRAYS[name]
    content = {key: array for key, array in (arrays() | changes).items() if array is not None}
    np.savez("bad.npz", **content)
    project.params(dataset="bad.npz")
    project.refused("make-longtail", "bad.npz", *words)


FILES = {
    "empty": b"",
    "text": b"train_images: 3\n",
    "a picture": struct.pack(">I", 0x89504E47) * 30,
    "a zip cut short": None,
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_npz(project, name):
    content = FILES[name]
    if content is None:
        content = Path("good.npz").read_bytes()[:-200]
    Path("bad.npz").write_bytes(content)
    project.params(dataset="bad.npz")
    project.refused("make-longtail", "bad.npz", "no .npz")


@pytest.mark.parametrize("shape", [(10**15,), (2**62, 2**62), (-1, 8), (60, 8, 9)])
def test_a_header_that_claims_more_than_there_is(project, shape):
    npz_of("bad.npz", train_images=header_claims(shape), train_labels=npy(LABELS))
    project.params(dataset="bad.npz")
    project.refused("make-longtail", "bad.npz", "train_images", "damaged")


@pytest.mark.parametrize(
    "content", [npy(np.array([{"a": 1}], dtype=object)), b"\x93NUMPY\x09\x00", b"no array", b""]
)
def test_members_that_are_no_plain_arrays(project, content):
    npz_of("bad.npz", train_images=content, train_labels=npy(LABELS))
    project.params(dataset="bad.npz")
    project.refused("make-longtail", "bad.npz")


def test_a_flipped_bit_in_an_npz(project):
    content = bytearray(Path("good.npz").read_bytes())
    content[600] ^= 4
    Path("good.npz").write_bytes(content)
    project.refused("make-longtail", "good.npz", "damaged")


def broken(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))


def stack(path):
    pages = [Image.new("L", (8, 8), 40 * i) for i in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])


FOLDERS = {
    "empty": (lambda f: f.mkdir(), ["0 class folders"]),
    "one class": (lambda f: classes(f, ("a",)), ["1 class folders"]),
    "a class without images": (lambda f: (classes(f), (f / "c").mkdir()), ["mine/c", "no image"]),
    "a broken image": (lambda f: (classes(f), broken(f / "a/x.png")), ["a/x.png"]),
    "several pages": (lambda f: (classes(f), stack(f / "b/s.tif")), ["b/s.tif", "3 pages"]),
    "other sizes": (lambda f: (classes(f), picture(f / "a/x.png", side=9)), ["size", "9 x 9"]),
    "floats": (lambda f: (classes(f), picture(f / "a/x.tif", mode="F")), ["x.tif", "floating"]),
    "other classes to test": (
        lambda f: (classes(f / "train"), classes(f / "TEST", ("a", "c"))),
        ["TEST", "a, c", "those of train"],
    ),
    "a folder beside the splits": (
        lambda f: (classes(f / "train"), classes(f / "extra")), ["extra", "beside train"],
    ),
    "two for one split": (
        lambda f: (classes(f / "train"), classes(f / "val"), classes(f / "Validation")),
        ["both for val"],
    ),
    "classes above splits": (
        lambda f: (classes(f / "x", ("p", "q")), classes(f / "y", ("p", "q"))),
        ["p, q within each of x, y"],
    ),
    "one image a class": (lambda f: classes(f, count=1), ["class 'a'", "at least 2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(project, name):
    make, words = FOLDERS[name]
    make(Path("mine"))
    project.params(dataset="mine")
    project.refused("make-longtail", *words)


def test_names_that_are_no_utf8_are_read(project):
    names = [os.fsdecode(b"caf\xe9"), "b"]
    try:
        classes(Path("mine"), names, count=30)
    except OSError:
        pytest.skip("this file system has no such names")
    project.params(dataset="mine")
    code, lines = project.run("make-longtail")
    assert (code, lines) == (0, [])
    assert json.loads(Path("metrics/main/data.json").read_text())["classes"] == ["b", "caf\\xe9"]
    assert project.run("search")[0] == 0


PARAMETERS = {
    "unknown": ({"lr": 1}, ["params.yaml", "lr", "unknown key"]),
    "unknown in a section": ({"search": {"epoch": 1}}, ["search.epoch", "unknown key"]),
    "a section of text": ({"search": "fast"}, ["search", "mapping"]),
    "loss": ({"loss": "hinge"}, ["params.yaml: loss", "hinge", "focal+la"]),
    "dataset": ({"dataset": "data/raw/nope"}, ["dataset", "data/raw/nope"]),
    "dataset a number": ({"dataset": 3}, ["params.yaml: dataset", "text"]),
    "scale a list": ({"scale": ["small"]}, ["scale", "['small']", "small"]),
    "scale a mapping": ({"scale": {"small": 1}}, ["scale"]),
    "no scales": ({"scales": None}, ["scales", "mapping"]),
    "seed": ({"seed": -1}, ["seed", "-1"]),
    "seed too large": ({"seed": 10**30}, ["seed"]),
    "size": ({"data": {"size": 1000000}}, ["data.size", "4,096"]),
    "cells": ({"search": {"cells": 1000000}}, ["search.cells", "100"]),
    "channels": ({"search": {"channels": 10**9}}, ["search.channels", "4,096"]),
    "an integer beyond floats": ({"search": {"learning_rate": 10**400}}, ["learning_rate"]),
    "not a number": ({"search": {"learning_rate": float("nan")}}, ["learning_rate", "nan"]),
    "true for a number": ({"search": {"epochs": True}}, ["search.epochs", "whole number"]),
    "decide": ({"decide": "best"}, ["decide", "best", "balanced"]),
    "decide for other classes": ({"decide": {"cat": 1.0}}, ["decide", "cat", "0, 1, 2"]),
    "decide a list": ({"decide": [1]}, ["decide"]),
    "groups": ({"data": {"groups": "(x"}}, ["groups", "no file names"]),
    "val_fraction": ({"data": {"val_fraction": 0.9}}, ["data.val_fraction", "0.5"]),
    "largest_class": ({"data": {"profile": "step", "imbalance": 1000}}, ["imbalance"]),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(project, name):
    changes, words = PARAMETERS[name]
    project.params(**changes)
    project.refused("make-longtail", *words)


TEXTS = {
    "a key twice": "dataset: digits\ndataset: faces\nscales: {small: {}}\n",
    "no mapping": "- 1\n- 2\n",
    "no YAML": "dataset: [1\n",
    "a tag": "dataset: !!python/object/apply:os.system ['true']\n",
    "nested": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "an integer of many digits": "seed: " + "9" * 6000 + "\n",
    "not text": b"\xff\xfe\x00dataset",
    "empty": "",
    "a null byte": "dataset: a\0b\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_parameters(project, name):
    text = TEXTS[name]
    Path("params.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    project.refused("make-longtail", "params.yaml")


def test_no_parameters(project):
    Path("params.yaml").unlink()
    project.refused("make-longtail", "params.yaml", "not found")


ENTRIES = {
    "a name that leads elsewhere": ({"name": "../../escape"}, ["name", "../../escape"]),
    "an absolute name": ({"name": "/tmp/escape"}, ["name", "/tmp/escape"]),
    "a list for a name": ({"name": ["x"]}, ["name", "['x']"]),
    "no name": ({"name": None}, ["name"]),
    "a scale that leads elsewhere": ({"scale": "../small"}, ["scale"]),
    "text for an entry": ("text", ["small-x", "mapping"]),
    "nothing for an entry": (None, ["small-x", "mapping"]),
    "an unknown key": ({"lr": 1}, ["lr", "unknown key"]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_rows(project, name):
    changes, words = ENTRIES[name]
    entry = {"name": "x", "system": "x", "scale": "small", "dataset": "good.npz"}
    entry = entry | changes if isinstance(changes, dict) else changes
    Path("papers").mkdir()
    Path("papers/rows.yaml").write_text(yaml.safe_dump({"datasets": {"small-x": entry}}))
    project.refused("make-longtail", "rows.yaml", *words, kind="datasets", key="small-x")
    assert not list(Path("..").glob("escape*"))


def multi_label(**columns):
    labels = np.stack([LABELS == 0, LABELS < 2, *columns.values()], axis=1).astype(np.uint8)
    return arrays() | {"train_labels": labels}


@pytest.mark.parametrize(
    ("loss", "column", "words"),
    [
        ("focal+la", 0 * LABELS, ["'2' occurs never", "focal"]),
        ("focal+la", 0 * LABELS + 1, ["'2' occurs on every image", "ce"]),
    ],
)
def test_a_label_that_the_loss_cannot_use_ends_before_the_search(project, loss, column, words):
    np.savez("odd.npz", **multi_label(third=column))
    project.params(dataset="odd.npz", loss=loss)
    assert project.run("make-longtail")[0] == 0
    code, lines = project.run("search")
    assert code == 1 and len(lines) == 1
    assert all(word in lines[0] for word in ["loss", loss, *words]), lines[0]
    assert not Path("artifacts").exists()


def test_a_class_without_training_images_ends_before_the_search(project):
    np.savez("odd.npz", **arrays(), class_names=np.array(["x", "y", "z", "never"]))
    project.params(dataset="odd.npz", data={"profile": "natural"})
    code, lines = project.run("make-longtail")
    if code == 0:
        code, lines = project.run("search")
    assert code == 1 and len(lines) == 1 and "'never'" in lines[0], lines


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"omega_share": 1e-9}, ["search.omega_share", "0 ω"]),
        ({"batch_size": 500}, ["search.batch_size", "500"]),
        ({"partial": 3}, ["search.partial"]),
    ],
)
def test_options_of_the_search_are_named_by_their_key(project, search, words):
    assert project.run("make-longtail")[0] == 0
    project.params(search=search)
    code, lines = project.run("search")
    assert code == 1 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not Path("artifacts").exists()


@pytest.mark.parametrize("device", ["meta", "cuda:99", "gpu", ""])
def test_devices(project, device):
    assert project.run("make-longtail")[0] == 0
    project.params(device=device)
    code, lines = project.run("search")
    assert code == 1 and len(lines) == 1 and "device" in lines[0]


def test_a_search_beyond_the_memory_ends_before_it_begins(project):
    assert project.run("make-longtail")[0] == 0
    project.params(search={"channels": 4096, "cells": 100})
    code, lines = project.run("search")
    assert code == 1 and len(lines) == 1
    assert all(word in lines[0] for word in ("memory", "GiB", "search.channels")), lines


def test_a_training_beyond_the_memory_ends_before_it_begins(finished):
    finished.params(finetune={"channels": 4096, "cells": 100, "inherit": False})
    code, lines = finished.run("finetune")
    assert code == 1 and len(lines) == 1
    assert all(word in lines[0] for word in ("memory", "GiB", "finetune.channels")), lines


@pytest.mark.parametrize(
    "name", ["search", "derive-genotype", "finetune", "evaluate", "transfer", "export"]
)
def test_a_stage_without_its_input_names_the_command(project, name):
    project.params(transfer={"dataset": "good.npz"})
    project.refused(name, "splits.npz", "not found", "dvc repro")


@pytest.mark.parametrize("content", ["{}", "", "[]", "null", '{"normal": []}', "\x00"])
def test_a_damaged_genotype_is_named_with_its_file(finished, content):
    Path("metrics/main/genotype.json").write_text(content)
    for name in ("finetune", "evaluate", "export"):
        code, lines = finished.run(name)
        assert code == 1 and len(lines) == 1
        assert "genotype.json" in lines[0] and "dvc" in lines[0]


def test_the_parameters_of_this_list_are_good(project):
    assert PARAMS["dataset"] == "good.npz"
    for name in ("make-longtail", "search", "derive-genotype", "finetune", "evaluate", "export"):
        code, lines = project.run(name)
        assert (code, lines) == (0, []), name
