"""The pipeline in one call, beside the stages that DVC runs; the estimator; the export."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

import ssnas
import ssnas.pipeline.fit as module
from ssnas.config.load import PRESETS, load_main, read_yaml
from ssnas.data import read
from ssnas.errors import InputError
from ssnas.networks.genotype import FIXED
from ssnas.pipeline.artifacts import Places
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.evaluate import evaluate
from ssnas.pipeline.export import export
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.search import run_search
from ssnas.report.card import write_card

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SEARCH = {"channels": 4, "epochs": 1, "batch_size": 8, "projector": 8, "knn_every": 0}
FINETUNE = {"epochs": 6, "batch_size": 8, "learning_rate": 0.1}
SHORT = {"search": SEARCH, "finetune": FINETUNE, "device": "cpu"}


def drawn(classes=3, each=20, seed=0):
    """Images of noise whose brightness is their class."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), each)
    images = rng.integers(0, 60, (len(labels), 8, 8, 1)) + 90 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


@pytest.fixture
def npz(tmp_path):
    images, labels = drawn()
    np.savez(tmp_path / "drawn.npz", train_images=images, train_labels=labels)
    return tmp_path / "drawn.npz"


def test_the_presets_are_those_of_the_pipeline():
    assert read_yaml(PRESETS)["scales"] == read_yaml(ROOT / "params.yaml")["scales"]


def test_fit_gives_the_weights_of_the_stages(npz, tmp_path, monkeypatch):
    """Bit for bit, from the same parameters; and predictions of the model file."""
    monkeypatch.chdir(tmp_path)
    document = {"scales": {"small": {}}, "dataset": str(npz), **SHORT}
    document["data"] = {"profile": "natural"}
    Path("params.yaml").write_text(yaml.safe_dump(document))
    run = load_main()
    for stage in (make_longtail, run_search, derive_genotype, finetune, evaluate, export):
        stage(run)
    model = ssnas.fit(npz, out="mine", params="params.yaml")
    by_stages, by_fit = Places.of(run), Places({"searches": ".", "rows": "."}, Path("mine"))
    for name in ("supernet", "network"):
        mine, theirs = (load_file(getattr(places, name)) for places in (by_fit, by_stages))
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
    figures = [
        json.loads(places.metrics("rows", "evaluate.json").read_text())
        for places in (by_fit, by_stages)
    ]
    assert figures[0] == figures[1]

    images, _ = drawn(seed=1)
    loaded = ssnas.load("mine/model.ssnas")
    exported = ssnas.load(by_stages.model)
    for other in (loaded, exported):
        np.testing.assert_array_equal(model.predict_proba(images), other.predict_proba(images))
    facts = json.loads(by_stages.metrics("rows", "export.json").read_text())
    assert facts["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(by_stages.model.with_suffix(".onnx"))
    (by_onnx,) = session.run(None, {"images": images})
    np.testing.assert_allclose(by_onnx, model.predict_proba(images), atol=1e-5)
    cost = json.loads(by_stages.metrics("rows", "export.cost.json").read_text())
    assert cost["onnx_ms_at_batch_1"] > 0
    write_card(Path("metrics/main"), Path("card.md"))
    card = Path("card.md").read_text()
    assert "| balanced (all classes equally frequent) |" in card
    assert "{{" not in card and "None" not in card


def test_fit_goes_on_and_does_nothing_twice(npz, tmp_path, monkeypatch, caplog):
    out = tmp_path / "mine"
    caplog.set_level("INFO")

    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", killed)
        patch.setattr(killed, "__module__", "ssnas.pipeline.finetune")
        with pytest.raises(KeyboardInterrupt):
            ssnas.fit(npz, out=out, **SHORT)
    assert not (out / "model.ssnas").exists()
    first = ssnas.fit(npz, out=out, **SHORT)
    assert "search: done before" in caplog.text
    assert "finetune: done before" not in caplog.text
    caplog.clear()
    second = ssnas.fit(npz, out=out, **SHORT)
    assert all(f"{name}: done before" in caplog.text for name in ("search", "finetune"))
    images, _ = drawn(seed=1)
    np.testing.assert_array_equal(first.predict_proba(images), second.predict_proba(images))
    caplog.clear()
    ssnas.fit(npz, out=out, **SHORT | {"finetune": FINETUNE | {"epochs": 2}})
    assert "search: done before" in caplog.text
    assert "finetune: done before" not in caplog.text
    caplog.clear()
    images, labels = drawn(seed=2)
    np.savez(npz, train_images=images, train_labels=labels)
    ssnas.fit(npz, out=out, **SHORT)
    assert "done before" not in caplog.text


def test_an_image_behind_a_link_is_noticed(tmp_path, caplog):
    images, labels = drawn(classes=2, each=20)
    elsewhere = tmp_path / "elsewhere"
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = elsewhere if label else tmp_path / "photos" / "dark"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
    (tmp_path / "photos" / "light").mkdir()
    (tmp_path / "photos" / "light" / "linked").symlink_to(elsewhere, target_is_directory=True)
    ssnas.fit(tmp_path / "photos", out=tmp_path / "mine", **SHORT)
    Image.new("L", (8, 8), 200).save(elsewhere / "new.png")
    caplog.set_level("INFO")
    ssnas.fit(tmp_path / "photos", out=tmp_path / "mine", **SHORT)
    assert "make_longtail: done before" not in caplog.text
    ssnas.fit(tmp_path / "photos", out=tmp_path / "mine", **SHORT)
    assert "make_longtail: done before" in caplog.text


def test_fit_takes_arrays_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = drawn()
    names = np.array(["dark", "grey", "white"])[labels]
    model = ssnas.fit((images[..., 0], names), **SHORT)
    assert model.class_names == ("dark", "grey", "white")
    assert (model.predict(images)["class"] == names).mean() > 0.8
    assert not list(tmp_path.iterdir())


def test_fit_keeps_groups_together(tmp_path):
    images, labels = drawn()
    patients = np.array([f"p{i // 3}" for i in range(len(images))])
    ssnas.fit((images, labels, patients), out=tmp_path, **SHORT)
    made = read(tmp_path / "data" / "splits.npz")
    sets = [set(part.groups.tolist()) for part in (made.train, made.val, made.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 20


def test_fit_of_several_labels(tmp_path):
    images, labels = drawn(classes=2, each=40)
    rows = np.stack([labels, np.arange(len(labels)) % 3 == 0], axis=1)
    model = ssnas.fit((images, rows), decide="f1", out=tmp_path / "mine", **SHORT)
    assert model.description.multi_label and len(model.description.thresholds) == 2
    assert list(model.predict(images[:2]).columns) == ["labels", "P(0)", "P(1)"]
    figures = json.loads((tmp_path / "mine/metrics/evaluate.json").read_text())
    assert set(figures["decisions"]) == {"published", "balanced", "natural", "f1"}


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("no/such/folder", {}, ["no/such/folder", "image folder"]),
        (7, {}, ["int", "(images, labels)"]),
        ((np.zeros((4, 8, 8)), [0, 1, 0, 1]), {}, ["images", "float64", "uint8"]),
        ((np.zeros((4, 8, 8), np.uint8), [0, 1]), {}, ["labels", "4 images"]),
        (drawn(), {"lr": 1}, ["options: lr", "unknown key", "loss", "size", "search"]),
        (drawn(), {"search": {"epoch": 1}}, ["options: search.epoch", "epochs"]),
        (drawn(), {"decide": "f1"}, ["decide", "'f1'", "balanced"]),
        (drawn(), {"decide": {"0": 0.5, "1": 0.5}}, ["frequency for each of 0, 1, 2"]),
    ],
)
def test_what_cannot_be_fitted_is_named_before_the_search(data, options, words, tmp_path):
    with pytest.raises(InputError) as error:
        ssnas.fit(data, out=tmp_path / "mine", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine" / "artifacts").exists()


def test_the_estimator_keeps_scikit_learns_conventions():
    images, labels = drawn()
    names = np.array(["x", "y", "z"])[labels]
    longer = FINETUNE | {"epochs": 25}
    estimator = ssnas.Classifier(search=SEARCH, finetune=longer, flip=False, device="cpu")
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params()
    scores = cross_val_score(copy, images, names, cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.7
    fitted = estimator.fit(images, names)
    assert fitted is estimator
    assert fitted.classes_.tolist() == ["x", "y", "z"]
    probabilities = fitted.predict_proba(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (fitted.predict(images) == fitted.classes_[probabilities.argmax(axis=1)]).all()
    assert fitted.score(images, names) > 0.8


def test_the_estimator_says_that_it_is_not_fitted():
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        ssnas.Classifier().predict(np.zeros((1, 8, 8), np.uint8))


def test_without_a_search_the_fixed_genotype_is_trained_from_scratch(tmp_path):
    images, labels = drawn()
    model = ssnas.fit((images, labels), out=tmp_path, finetune=FINETUNE, device="cpu")
    assert model.description.genotype == FIXED
    facts = json.loads((tmp_path / "metrics" / "finetune.json").read_text())
    assert not facts["inherited"]
    assert model.description.search.stem == "cifar", "images of 8 pixels keep their resolution"
    assert (model.predict(list(images[:3]))["class"] == model.class_names[0]).tolist()[0]


def test_a_search_by_name_is_searched(tmp_path):
    images, labels = drawn()
    search = {"epochs": 1, "channels": 4, "batch_size": 8, "projector": 8}
    model = ssnas.fit((images, labels), out=tmp_path, search=search, finetune=FINETUNE)
    assert model.description.genotype != FIXED
    assert json.loads((tmp_path / "metrics" / "finetune.json").read_text())["inherited"]


def test_a_time_is_shared_and_a_second_start_keeps_the_choice(tmp_path, caplog):
    images, labels = drawn(each=40)
    caplog.set_level("INFO")
    search = {"epochs": 1, "channels": 4, "batch_size": 8, "projector": 8}
    settings = {"search": search, "finetune": {"batch_size": 8}, "device": "cpu"}
    ssnas.fit((images, labels), out=tmp_path, minutes=0.05, **settings)
    budget = json.loads((tmp_path / "budget.json").read_text())
    rows = (tmp_path / "metrics" / "finetune.csv").read_text().splitlines()
    assert len(rows) - 1 == budget["finetune"]["epochs"] >= 1
    caplog.clear()
    ssnas.fit((images, labels), out=tmp_path, minutes=0.05, **settings)
    assert "finetune: done before" in caplog.text
    assert "fit into the time" not in caplog.text
    ssnas.fit((images, labels), out=tmp_path, minutes=0.1, **settings)
    longer = json.loads((tmp_path / "budget.json").read_text())
    assert longer["finetune"]["asked"]["seconds"] == pytest.approx(6)


@pytest.mark.parametrize("minutes", [0, -1, "two", float("nan"), True])
def test_minutes_are_a_number_above_0(minutes, tmp_path):
    with pytest.raises(InputError, match="minutes"):
        ssnas.fit(drawn(), out=tmp_path, minutes=minutes)
