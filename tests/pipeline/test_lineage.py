"""Every reader compares what an artifact was made from, by whatever way a stage is called."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import ssnas.pipeline.lineage as lineage
from ssnas.config.load import load_main
from ssnas.errors import InputError
from ssnas.pipeline.artifacts import Places
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.evaluate import evaluate
from ssnas.pipeline.export import export
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.search import run_search
from ssnas.pipeline.transfer import transfer
from ssnas.pipeline.work import identity
from ssnas.runtime.identity import differences
from ssnas.training.checkpoint import Checkpoint

SCALE = {
    "search": {"channels": 4, "epochs": 1, "batch_size": 8, "projector": 8, "knn_every": 0},
    "finetune": {"epochs": 1, "batch_size": 8},
}
PARAMS = {
    "dataset": "mine.npz",
    "data": {"profile": "natural"},
    "transfer": {"dataset": "mine.npz", "weights": "finetune", "epochs": 1, "folds": 2},
    "scales": {"small": SCALE},
    "device": "cpu",
}
CHAIN = (make_longtail, run_search, derive_genotype, finetune, evaluate)
READERS = {
    "search": run_search,
    "derive_genotype": derive_genotype,
    "finetune": finetune,
    "evaluate": evaluate,
    "transfer": transfer,
    "export": export,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all stages but transfer and export have run."""
    folder = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.integers(0, 60, (60, 8, 8)) + 90 * labels[:, None, None]
    np.savez(folder / "mine.npz", train_images=images.astype(np.uint8), train_labels=labels)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in CHAIN:
            stage(load_main())
    return folder


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


def edit(**changes):
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS | changes))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_what_belongs_together_is_read(project, name):
    READERS[name](load_main())


@pytest.mark.parametrize(
    ("changes", "first", "named"),
    [
        ({"data": {"profile": "natural", "val_fraction": 0.2}}, "search", "data.val_fraction"),
        ({"seed": 1}, "search", "seed: 0 there, 1 here"),
        ({"search": {"epochs": 2}}, "derive_genotype", "search.epochs: 1 there, 2 here"),
        ({"views": {"min_area": 0.5}}, "derive_genotype", "views.min_area"),
        ({"derive": {"rule": "darts"}}, "finetune", "derive.rule: argmax there, darts here"),
        ({"loss": "ce"}, "evaluate", "finetune.loss: focal+la there, ce here"),
        ({"decide": "natural"}, "export", "decide"),
    ],
)
def test_other_parameters_are_refused_by_all_that_follow(project, changes, first, named):
    edit(**changes)
    names = list(READERS)
    for name in names[names.index(first) :]:
        if (name == "transfer") and "decide" in changes:
            continue
        with pytest.raises(InputError) as error:
            READERS[name](load_main())
        assert named in str(error.value), (name, error.value)
        assert "dvc repro" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_new_name_of_the_data_set_is_not_written_beside_old_figures(project):
    shutil.copy("mine.npz", "other.npz")
    edit(dataset="other.npz")
    before = Path("metrics/main/evaluate.json").read_bytes()
    with pytest.raises(InputError, match=r"data\.dataset: mine\.npz there, other\.npz here"):
        evaluate(load_main())
    assert Path("metrics/main/evaluate.json").read_bytes() == before


def test_edited_images_are_noticed_by_every_reader(project):
    with np.load("mine.npz") as arrays:
        edited = dict(arrays)
    edited["train_labels"] = edited["train_labels"][::-1]
    np.savez("mine.npz", **edited)
    for name, stage in READERS.items():
        with pytest.raises(InputError, match="other images"):
            stage(load_main())
        assert name


def test_artifacts_are_read_without_the_images_that_they_are_from(project):
    """As in a clone that has pulled them."""
    Path("mine.npz").unlink()
    evaluate(load_main())


@pytest.mark.parametrize("name", list(lineage.ARTIFACTS))
def test_one_flipped_bit_is_found(project, name):
    run = load_main()
    flip_a_bit(lineage.ARTIFACTS[name].path(Places.of(run)))
    with pytest.raises(InputError, match="damaged"):
        export(run)


@pytest.mark.parametrize("name", list(lineage.ARTIFACTS))
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 3}', "\x00", '"text"'])
def test_a_damaged_record_is_one_line(project, name, content):
    record = Path("metrics/main/lineage", f"{name}.json")
    record.write_text(content)
    with pytest.raises(InputError) as error:
        export(load_main())
    assert name in str(error.value) or "record" in str(error.value)
    assert "dvc repro" in str(error.value) and "\n" not in str(error.value)
    record.unlink()
    with pytest.raises(InputError, match=r"has no record .*; `dvc repro` makes both"):
        export(load_main())


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("splits", "make_longtail"),
        ("supernet", "search"),
        ("genotype", "derive_genotype"),
        ("network", "finetune"),
        ("figures", "evaluate"),
    ],
)
def test_artifacts_of_other_code_are_refused(project, monkeypatch, name, stage):
    real = lineage.closure

    def edited(module):
        sources = real(module)
        return sources | ({"ssnas/losses.py": "0" * 64} if module.endswith(stage) else {})

    monkeypatch.setattr(lineage, "closure", edited)
    with pytest.raises(InputError, match="other code"):
        export(load_main())


def test_a_search_stays_valid_when_other_code_makes_the_same_splits(project, monkeypatch):
    real = lineage.closure

    def edited(module):
        sources = real(module)
        return sources | ({"ssnas/data/listing.py": "0" * 64} if "make_longtail" in module else {})

    monkeypatch.setattr(lineage, "closure", edited)
    make_longtail(load_main())
    evaluate(load_main())


def test_a_genotype_of_another_search_is_refused(project):
    """By hand: another search, then the old genotype."""
    edit(search={"alpha_learning_rate": 0.1})
    run_search(load_main())
    with pytest.raises(InputError, match=r"genotype\.json: .*other inputs\.supernet"):
        finetune(load_main())


@pytest.mark.parametrize("stage", [run_search, finetune])
def test_a_training_does_not_go_on_with_other_kernels(project, monkeypatch, caplog, stage):
    """It would end with weights that neither gives."""
    run = load_main()
    name, kind = ("search", "searches") if stage is run_search else ("finetune", "rows")
    about = identity(run, "supernet" if stage is run_search else "network", torch.device("cpu"))
    other = {"device": "cpu", "compiled_kernels": not about["computed_by"]["compiled_kernels"]}
    folder = Places.of(run).checkpoint(kind, name) / "0"
    with Checkpoint(folder, about | {"computed_by": other}) as checkpoint:
        checkpoint.save({})
    stage(run)
    assert "computed_by.compiled_kernels" in caplog.text
    assert "starting anew" in caplog.text


def test_the_record_says_what_computed(project):
    recorded = json.loads(Path("metrics/main/lineage/network.json").read_text())
    assert recorded["computed_by"]["device"] == "cpu"
    assert recorded["parameters"]["finetune"] == dataclasses.asdict(load_main().finetune)


def test_differences():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({"a": 1}, {"b": 1}) == ["a: 1 there, None here", "b: None there, 1 here"]
