"""The model as a file, its predictions, and its ONNX graph."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ssnas
from ssnas.config.schema import Finetune, Search
from ssnas.data.folders import decode
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.model import FORMAT, Description, Model
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import kept_operations
from ssnas.networks.space import EDGES

CELL = tuple(Edge(*edge, kept_operations()[i % 7]) for i, edge in enumerate(EDGES))


def made(loss="focal+la", multi_label=False, shape=(9, 9, 3), decide="balanced", **settings):
    """A model with random weights and statistics of three classes."""
    description = Description(
        class_names=("ant", "bee", "Käfer"),
        multi_label=multi_label,
        image_shape=shape,
        normalise=Normalise((0.4,) * shape[2], (0.2,) * shape[2]),
        counts=(70, 20, 10),
        num_images=100,
        finetune=Finetune(loss=loss, epochs=10, **settings),
        search=Search(channels=4),
        genotype=Genotype(CELL, CELL),
        temperature=1.3,
        thresholds=(0.2, 0.3, 0.05) if multi_label else (),
        decide=decide,
        provenance={"source": "drawn"},
    )
    torch.manual_seed(0)
    network = description.network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(network.classifier.weight)
    return Model(network, description, "cpu")


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_saved_model_is_the_same_model(tmp_path, images, multi_label):
    model = made(multi_label=multi_label)
    model.save(tmp_path / "model.ssnas")
    assert [path.name for path in tmp_path.iterdir()] == ["model.ssnas"]
    loaded = ssnas.load(tmp_path / "model.ssnas")
    assert loaded.description == model.description
    np.testing.assert_array_equal(loaded.predict_proba(images), model.predict_proba(images))
    assert "Käfer (10)" in loaded.info()


def test_a_model_loads_without_what_made_it(tmp_path, model):
    """In another folder, and without DVC, pandas, scikit-learn and torchvision."""
    model.save(tmp_path / "model.ssnas")
    program = (
        "import sys\n"
        "for name in ('dvc', 'pandas', 'sklearn', 'scipy', 'torchvision', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np, ssnas\n"
        "model = ssnas.load('model.ssnas')\n"
        "print(model.predict_proba(np.zeros((2, 9, 9, 3), np.uint8)).shape)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ssnas.__path__[0] + "/.."), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )  # fmt: skip
    assert result.stdout == "(2, 3)\n", result.stderr


def test_predictions_come_in_the_order_of_the_images(tmp_path, model, images):
    """Files, arrays and Pillow images together; files of other sizes and modes are converted."""
    path = tmp_path / "wide grey.png"
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(path)
    prepared = decode(path.read_bytes(), 3, (9, 9))
    mixed = [images[0], path, Image.fromarray(images[1]), str(path)]
    table = model.predict(mixed)
    assert list(table.index) == [0, str(path), 2, str(path)]
    expected = model.predict_proba(np.stack([images[0], prepared, images[1], prepared]))
    np.testing.assert_allclose(table.filter(like="P(").to_numpy(), expected, atol=1e-7)
    assert list(table["class"]) == [model.class_names[i] for i in expected.argmax(axis=1)]
    assert list(table.columns[1:]) == ["P(ant)", "P(bee)", "P(Käfer)"]


def test_batches_do_not_change_predictions(model, images):
    whole, single = (model.predict_proba(images, batch=batch) for batch in (256, 2))
    np.testing.assert_allclose(whole, single, atol=1e-6)


@pytest.mark.parametrize("one", ["array", "file", "image"])
def test_one_image_is_a_table_of_one_row(tmp_path, model, images, one):
    path = tmp_path / "one.png"
    Image.fromarray(images[0]).save(path)
    item = {"array": images[0], "file": path, "image": Image.fromarray(images[0])}[one]
    assert len(model.predict(item)) == 1


def test_no_image_is_an_empty_table(model):
    assert model.predict([]).shape == (0, 4)


def test_a_prior_of_the_place_of_use(model, images):
    natural, balanced = (model.predict_proba(images, prior) for prior in ("natural", "balanced"))
    np.testing.assert_allclose(model.predict_proba(images), balanced)
    odds = np.log(balanced / natural)
    expected = np.log([1 / 3 / 0.7, 1 / 3 / 0.2, 1 / 3 / 0.1])
    np.testing.assert_allclose(odds - odds[:, :1], np.tile(expected - expected[0], (5, 1)))
    named = model.predict_proba(images, {"ant": 0.2, "Käfer": 0.5, "bee": 0.3})
    np.testing.assert_allclose(named, model.predict_proba(images, [0.2, 0.3, 0.5]))


def test_labels_are_those_above_their_thresholds(images):
    model = made(multi_label=True, decide="f1")
    table = model.predict(images)
    above = table.filter(like="P(").to_numpy() > [0.2, 0.3, 0.05]
    names = np.array(model.class_names)
    assert list(table["labels"]) == ["; ".join(names[row]) for row in above]
    halves = model.predict(images, prior="natural")
    assert list(halves["labels"]) == [
        "; ".join(names[row]) for row in halves.filter(like="P(").to_numpy() > 0.5
    ]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("nowhere.png", ["nowhere.png", "No such file"]),
        (b"no image", ["broken.png", "no known image format"]),
        (np.zeros((9, 9, 3)), ["float64", "uint8"]),
        (np.zeros((9, 9, 4), np.uint8), ["(9, 9, 4)"]),
    ],
)
def test_what_is_no_image_is_named(tmp_path, model, item, words):
    if isinstance(item, bytes):
        path = tmp_path / "broken.png"
        path.write_bytes(item)
        item = path
    with pytest.raises(InputError) as error:
        model.predict([item])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def changed(path, **fields):
    """Write the file's weights again, with other metadata."""
    with ssnas.model.safetensors.safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["ssnas"])
    document.pop("sha256")
    save_file(load_file(path), path, {"ssnas": json.dumps(document | fields)})


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), ["not found"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), ["damaged"]),
        (lambda path: path.write_bytes(b"a picture"), ["damaged or no model"]),
        (lambda path: flip_a_bit(path), ["damaged", "checksum"]),
        (lambda path: save_file({"w": torch.ones(1)}, path), ["no description"]),
        (lambda path: changed(path, format=FORMAT + 1), [f"format {FORMAT + 1}", "--upgrade"]),
        (lambda path: changed(path, counts=None), ["damaged description"]),
        (lambda path: changed(path, class_names=["a", "b"]), ["weights are not those"]),
        (lambda path: changed(path, finetune={"lr": 1}), ["finetune", "lr", "unknown key"]),
    ],
)
def test_a_file_that_is_no_model_is_named_in_one_line(tmp_path, model, damage, words):
    path = tmp_path / "model.ssnas"
    model.save(path)
    damage(path)
    with pytest.raises(InputError) as error:
        ssnas.load(path)
    assert str(error.value).startswith(str(path))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "model.ssnas"
    model.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"model\.ssnas: cannot be written \(No space"):
        model.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.ssnas"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "ldam-drw", "decide": "natural"},
        {"loss": "balanced-sigmoid", "decide": {"ant": 0.2, "bee": 0.3, "Käfer": 0.5}},
        {"multi_label": True, "decide": "f1"},
        {"decide": "published", "shape": (12, 10, 1)},
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_onnx_gives_the_same_probabilities(tmp_path, options):
    model = made(**options)
    model.export_onnx(tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type) == ("images", "tensor(uint8)")
    assert (returned.name, returned.type) == ("probabilities", "tensor(float)")
    shape = model.description.image_shape
    images = np.random.default_rng(0).integers(0, 256, (7, *shape), dtype=np.uint8)
    for count in (1, 7):
        (probabilities,) = session.run(None, {"images": images[:count]})
        expected = model.predict_proba(images[:count])
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == ["ant", "bee", "Käfer"]
    assert json.loads(facts["image_shape"]) == list(shape)
    assert json.loads(facts["thresholds"]) == list(
        np.broadcast_to(model.decision.threshold(options.get("decide", "")), 3)
    )
    # The export leaves the model as it was.
    np.testing.assert_array_equal(model.predict_proba(images[:count]), expected)


def test_an_export_without_onnx_says_what_to_install(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'ssnas\[export\]'"):
        model.export_onnx(tmp_path / "model.onnx")
