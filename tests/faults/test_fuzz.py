"""Whatever stands in a file: it is read, or refused in one line; never a traceback."""

import io
import string
import tempfile
from pathlib import Path

import numpy as np
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ssnas.config.load import load_main, load_options
from ssnas.config.schema import SECTIONS, TOP_LEVEL
from ssnas.data import load, read, split, write
from ssnas.data.checks import oddities
from ssnas.data.folders import decode
from ssnas.errors import InputError
from ssnas.networks.genotype import Genotype
from tests.faults.conftest import arrays

bounded = settings(max_examples=120)


def accepted_or_refused(work):
    """Run `work`; an InputError must be one line that says something."""
    try:
        return work()
    except InputError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000
        text.encode("utf-8")
        return None


def made_into_splits(source):
    def work():
        made = split(
            source, profile="natural", imbalance=1, largest_class=None, val_fraction=0.2,
            test_fraction=0.2, seed=0,
        )  # fmt: skip
        assert all(isinstance(line, str) for line in oddities(made))
        with tempfile.TemporaryDirectory() as folder:
            write(made, Path(folder, "splits.npz"))
            back = read(Path(folder, "splits.npz"))
        np.testing.assert_array_equal(back.train.images, made.train.images)
        np.testing.assert_array_equal(back.test.labels, made.test.labels)

    accepted_or_refused(work)


def mutated(content, edits):
    content = bytearray(content)
    for place, value in edits:
        content[int(place * (len(content) - 1))] = value
    return bytes(content)


edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


@bounded
@given(edits, st.booleans())
def test_npz_with_other_bytes(changes, compressed):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzzed.npz")
        path.write_bytes(mutated(file.getvalue(), changes))
        source = accepted_or_refused(lambda: load(str(path), Path(folder)))
        if source is not None:
            made_into_splits(source)


dtypes = st.sampled_from(["u1", "i1", "i8", "f4", "f8", "b1", "U2", "S3", "c8", "M8[s]"])


@bounded
@given(st.data())
def test_npz_of_any_arrays(data):
    n = data.draw(st.integers(0, 12))
    content = {}
    for key in ("train_images", "train_labels", "test_images", "test_labels", "class_names", "flip",
                "train_groups", "provenance"):  # fmt: skip
        if data.draw(st.booleans()) or key.startswith("train_i"):
            tail = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
            shape = (n, *tail) if data.draw(st.booleans()) else tail
            dtype = "u1" if data.draw(st.booleans()) else data.draw(dtypes)
            content[key] = data.draw(hnp.arrays(dtype, shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzzed.npz")
        np.savez(path, **content)
        source = accepted_or_refused(lambda: load(str(path), Path(folder)))
        if source is not None:
            made_into_splits(source)


names = st.text(string.printable + "äß猫\u202e", min_size=1, max_size=8).filter(
    lambda name: not set(name) & set("/\0") and name not in (".", "..")
)
KINDS = ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]


@st.composite
def pictures(draw):
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "F", "I"]))
    image = Image.new(mode, (draw(st.integers(1, 9)), draw(st.integers(1, 9))))
    file = io.BytesIO()
    try:
        image.save(file, draw(st.sampled_from(KINDS)))
    except (OSError, KeyError, ValueError):  # not every kind has every mode
        image.convert("RGB").save(file, "png")
    content = file.getvalue()
    return mutated(content, draw(edits)) if draw(st.booleans()) else content


@bounded
@given(
    st.dictionaries(
        st.tuples(names, names),
        st.one_of(pictures(), st.binary(max_size=40)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([None, 8]),
    st.sampled_from(["error", "skip"]),
)
def test_folders_of_anything(files, size, bad_images):
    with tempfile.TemporaryDirectory() as folder:
        for (part, name), content in files.items():
            path = Path(folder, "images", part, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        images = str(Path(folder, "images"))
        source = accepted_or_refused(
            lambda: load(images, Path(folder), size=size, bad_images=bad_images)
        )
        if source is not None:
            made_into_splits(source)


@bounded
@given(st.one_of(pictures(), st.binary(max_size=200)))
def test_any_bytes_as_a_picture(content):
    pixels = accepted_or_refused(lambda: decode(content, depth=1, sides=(8, 8)))
    assert pixels is None or (pixels.shape == (8, 8, 1) and pixels.dtype == np.uint8)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["small", "digits", "ce", "focal+la", 1e400, 10**40, -1, 0, "1e-3"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3)
)
keys = sorted({*TOP_LEVEL, *SECTIONS, "scales"})
inner_keys = sorted({key for section in SECTIONS.values() for key in section.__annotations__})


@bounded
@given(
    st.dictionaries(
        st.sampled_from(keys) | st.text(max_size=5),
        values | st.dictionaries(st.sampled_from(inner_keys), scalars, max_size=3),
        max_size=5,
    )
)
def test_parameters_of_any_values(document):
    try:
        text = yaml.safe_dump(document)
    except yaml.YAMLError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        path.write_text(text, encoding="utf-8", errors="replace")
        accepted_or_refused(lambda: load_main(path))
    options = {key: value for key, value in document.items() if isinstance(key, str)}
    accepted_or_refused(lambda: load_options(options, None, Path("x")))


@bounded
@given(st.binary(max_size=60) | st.text("a:[]{}&*!|>-'\"\n\t #%@`,?0", max_size=60).map(str.encode))
def test_any_text_as_parameters(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        path.write_bytes(content)
        accepted_or_refused(lambda: load_main(path))


@bounded
@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["normal", "reduce", "from", "to", "op"]), inner
)))  # fmt: skip
def test_any_document_as_a_genotype(document):
    import json

    accepted_or_refused(lambda: Genotype.from_json(json.dumps(document)))
