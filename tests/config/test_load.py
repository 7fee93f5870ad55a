"""Parameters: the project's own files load, and every mistake is named with what is accepted."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ssnas.config.load import load_main, load_row, read_yaml
from ssnas.config.schema import SECTIONS, Finetune
from ssnas.errors import InputError
from ssnas.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]
ROWS, PARAMS = ROOT / "papers" / "rows.yaml", ROOT / "params.yaml"
KINDS = ("datasets", "searches", "rows", "baselines", "transfers", "crossvalidations")
ROLES = {"baselines": "rows", "crossvalidations": "transfers"}
ENTRIES = [
    (kind, key) for kind in KINDS for key in yaml.safe_load(ROWS.read_text(encoding="utf-8"))[kind]
]
SCALES = {"scales": {"small": {}}}


@pytest.fixture
def main(tmp_path):
    """Load a params.yaml of these keys, or of this text."""

    def load(document=None, text=None):
        path = tmp_path / "params.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(SCALES | document), "utf-8")
        return load_main(path)

    return load


@pytest.fixture
def row(tmp_path):
    """Load an entry of a rows.yaml of these entries."""

    def load(kind, key, document, params=None):
        rows, settings = tmp_path / "rows.yaml", tmp_path / "params.yaml"
        rows.write_text(yaml.safe_dump(document), "utf-8")
        settings.write_text(yaml.safe_dump(SCALES | (params or {})), "utf-8")
        return load_row(kind, key, rows, settings)

    return load


def entries(**changes):
    """A data set, its search, its row and its transfer; `kind={...}` changes the entry's keys."""
    base = {
        "datasets": {"name": "d", "scale": "small"},
        "searches": {"name": "s", "scale": "small", "dataset": "d"},
        "rows": {"name": "r", "scale": "small", "search": "s"},
        "transfers": {"name": "t", "scale": "small", "row": "r"},
    }
    return {kind: {"key": entry | changes.get(kind, {})} for kind, entry in base.items()}


# The project's own files


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_own_parameters_load(scale, main):
    document = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    run = main(document | {"scale": scale, "recipe": "published"})
    assert run.scale == scale
    for section, values in document["scales"][scale].items():
        set_for_run = document.get(section, {})
        for key, value in values.items():
            assert getattr(getattr(run, section), key) == set_for_run.get(key, value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "key"), ENTRIES)
def test_own_rows_load(kind, key):
    run = load_row(kind, key, ROWS, PARAMS)
    assert (
        run.folders[ROLES.get(kind, kind)]
        == f"papers/{run.scale}/{kind}/{key.removeprefix(run.scale + '-')}"
    )
    assert key.startswith(f"{run.scale}-")


@pytest.mark.slow
def test_own_rows_have_folders_of_their_own():
    runs = [(kind, load_row(kind, key, ROWS, PARAMS)) for kind, key in ENTRIES]
    folders = [run.folders[ROLES.get(kind, kind)] for kind, run in runs]
    assert len(set(folders)) == len(folders)


# Layers


def test_default_then_scale_then_run(main):
    scales = {"small": {"finetune": {"epochs": 7, "tau": 0.5}}}
    run = main({"scales": scales, "finetune": {"epochs": 9}})
    assert (run.finetune.epochs, run.finetune.tau) == (9, 0.5)
    assert run.finetune.gamma == Finetune().gamma


def test_default_then_scale_then_row(row):
    scales = {"scales": {"small": {"finetune": {"epochs": 7, "tau": 0.5}}}}
    run = row("rows", "key", entries(rows={"epochs": 9}), scales)
    assert (run.finetune.epochs, run.finetune.tau) == (9, 0.5)
    assert run.finetune.gamma == Finetune().gamma


def test_sections_without_keys_are_the_defaults(main):
    run = main({})
    assert [getattr(run, name) for name in SECTIONS] == [kind() for kind in SECTIONS.values()]


def test_top_level_keys_reach_their_sections(main):
    run = main({"dataset": "cifar10", "loss": "ldam-drw", "seed": 3, "device": "cpu"})
    assert run.data.dataset == "cifar10"
    assert run.finetune.loss == run.transfer.loss == "ldam-drw"
    assert run.transfer.dataset != "cifar10"
    assert set(run.seeds.values()) == {3}
    assert run.device == "cpu"


def test_a_section_beats_the_top_level(main):
    run = main({"loss": "ce", "transfer": {"loss": "focal"}})
    assert (run.finetune.loss, run.transfer.loss) == ("ce", "focal")


def test_a_row_takes_every_section_from_its_chain(row):
    document = entries(
        datasets={"imbalance": 50.0, "seed": 1},
        searches={"channels": 4, "min_area": 0.5, "rule": "darts", "seed": 2},
        rows={"loss": "ce", "seed": 3},
        transfers={"folds": 3},
    )
    run = row("transfers", "key", document)
    assert run.data.imbalance == 50
    assert (run.search.channels, run.views.min_area, run.derive.rule) == (4, 0.5, "darts")
    assert (run.finetune.loss, run.transfer.folds) == ("ce", 3)
    assert run.seeds == {"datasets": 1, "searches": 2, "rows": 3, "transfers": 0}


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_numbers_without_a_point_are_numbers(main, text):
    run = main(text=f"scales: {{small: {{}}}}\nsearch: {{alpha_learning_rate: {text}}}\n")
    assert run.search.alpha_learning_rate == 3e-4


def test_whole_numbers_are_numbers(main):
    imbalance = main({"data": {"imbalance": 20}}).data.imbalance
    assert imbalance == 20
    assert isinstance(imbalance, float)


def test_runs_are_frozen(main):
    run = main({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.scale = "paper"
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.search.epochs = 1


# Mistakes

MISTAKES = [
    ({"finetun": {}}, ["finetun:", "finetune", "dataset"]),
    ({"search": {"chanels": 8}}, ["search.chanels", "channels"]),
    ({"search": 3}, ["search:", "3", "mapping"]),
    ({"search": {"channels": True}}, ["search.channels", "True", "whole number"]),
    ({"search": {"channels": 8.5}}, ["search.channels", "8.5", "whole number"]),
    ({"search": {"cells": None}}, ["search.cells", "None", "whole number"]),
    ({"search": {"learning_rate": "fast"}}, ["search.learning_rate", "'fast'", "a number"]),
    ({"search": {"learning_rate": False}}, ["search.learning_rate", "False", "a number"]),
    ({"search": {"objective": 1}}, ["search.objective", "1", "text"]),
    ({"search": {"objective": "simclr"}}, ["search.objective", "'simclr'", "nt-xent"]),
    ({"search": {"stem": "vgg"}}, ["search.stem", "'vgg'", "cifar", "imagenet"]),
    ({"search": {"checkpoint": 1}}, ["search.checkpoint", "1", "true or false"]),
    ({"data": {"imbalance": 0.5}}, ["data.imbalance", "0.5", "at least 1"]),
    ({"data": {"imbalance": float("nan")}}, ["data.imbalance", "nan", "at least 1"]),
    ({"data": {"imbalance": float("inf")}}, ["data.imbalance", "inf"]),
    ({"data": {"val_fraction": 0}}, ["data.val_fraction", "0", "more than 0", "at most 0.5"]),
    ({"data": {"flip": "yes"}}, ["data.flip", "'yes'", "true or false or null"]),
    ({"data": {"size": 4}}, ["data.size", "4", "at least 8"]),
    ({"finetune": {"inherit": 1}}, ["finetune.inherit", "1", "true or false"]),
    ({"loss": "hinge"}, ["loss", "'hinge'", *LOSSES]),
    ({"seed": -1}, ["seed", "-1", "at least 0"]),
    ({"seed": "0"}, ["seed", "'0'", "whole number"]),
    ({"device": 0}, ["device", "0", "text"]),
    ({"scale": "tiny"}, ["scale", "'tiny'", "small"]),
    ({"scales": {"small": {"derive": {}}}}, ["scales.small.derive", "finetune"]),
    ({"scales": {"small": {"search": 1}}}, ["scales.small.search", "mapping"]),
    ({"scales": {"small": {"search": {"epoch": 1}}}}, ["scales.small.search.epoch", "epochs"]),
    ({"scales": {"small": None}}, ["scales.small", "mapping"]),
    ({"scales": 3}, ["scales", "mapping"]),
]


@pytest.mark.parametrize(("document", "words"), MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_named(main, document, words):
    with pytest.raises(InputError) as caught:
        main(document)
    message = str(caught.value)
    assert "params.yaml" in message
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"loss": "hinge"}, "loss: found 'hinge'"),
        ({"loss": 3}, "loss: found 3"),
        ({"dataset": 3}, "dataset: found 3"),
        ({"seed": -1}, "seed: found -1"),
        ({"finetune": {"loss": "hinge"}}, "finetune.loss: found 'hinge'"),
        ({"transfer": {"dataset": 3}}, "transfer.dataset: found 3"),
        ({"scale": ["small"]}, "scale: found ['small']"),
        ({"scales": {"small": {"transfer": {"loss": "hinge"}}}}, "scales.small.transfer.loss"),
    ],
)
def test_mistakes_are_named_by_the_key_that_the_user_wrote(main, tmp_path, document, where):
    with pytest.raises(InputError) as caught:
        main(document)
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'}: {where}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nloss: ce\n\nloss: focal\n", "loss: found in lines 2 and 4"),
        ("search:\n  cells: 3\n  'cells': 3\n", "search.cells: found in lines 2 and 3"),
        ("search: {cells: 3, channels: 4, cells: 3}\n", "search.cells: found in lines 1 and 1"),
        ("rows:\n- {a: 1}\n- b: 1\n  b: 2\n", "rows.1.b: found in lines 3 and 4"),
    ],
)
def test_keys_that_stand_twice_are_refused(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}: {message}; accepted is one of them"


def test_a_key_may_stand_once_in_each_mapping_and_replace_a_merged_one(tmp_path):
    text = "a: &a {x: 1, y: {x: 2}}\nb: {c: &c {<<: *a, x: 3}}\nd: {<<: *c, x: 4}\n"
    path = tmp_path / "merged.yaml"
    path.write_text(text, "utf-8")
    assert read_yaml(path) == yaml.safe_load(text)
    assert read_yaml(path)["d"] == {"x": 4, "y": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "word"),
    [("search: [1, 2\nloss: ce\n", "YAML"), ("- 1\n", "mapping"), ("", "mapping")],
    ids=["broken", "list", "empty"],
)
def test_other_files(main, text, word):
    with pytest.raises(InputError, match=rf"params\.yaml: .*{word}") as caught:
        main(text=text)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: not found"):
        load_main(tmp_path / "nowhere.yaml")


ROW_MISTAKES = [
    ("rows", "other", {}, ["rows.other", "key"]),
    ("rows", "key", {"rows": {"epoch": 1}}, ["rows.key", "epoch"]),
    ("rows", "key", {"rows": {"loss": "hinge"}}, ["rows.key.loss", "'hinge'", "focal+la"]),
    ("rows", "key", {"rows": {"projector": 4}}, ["rows.key", "projector"]),
    ("rows", "key", {"rows": {"search": "z"}}, ["rows.key.search", "'z'", "small"]),
    ("rows", "key", {"searches": {"scale": "paper"}}, ["rows.key.search", "'s'", "small"]),
    ("transfers", "key", {"searches": {"dataset": "z"}}, ["dataset", "'z'"]),
    ("rows", "key", {"rows": {"scale": "tiny"}}, ["rows.key.search", "'tiny'"]),
    ("datasets", "key", {"datasets": {"scale": "tiny"}}, ["datasets.key.scale", "'tiny'", "small"]),
    ("rows", "key", {"searches": {"epochs": True}}, ["searches.key.epochs", "True"]),
    ("rows", "key", {"rows": {"seed": 0.5}}, ["rows.key.seed", "0.5"]),
]


@pytest.mark.parametrize(("kind", "key", "changes", "words"), ROW_MISTAKES)
def test_row_mistakes_are_named(row, kind, key, changes, words):
    with pytest.raises(InputError) as caught:
        row(kind, key, entries(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


BASELINE = {"name": "b", "scale": "small", "dataset": "d", "network": "resnet-32"}
CROSSED = {"name": "c", "scale": "small", "network": "darkcovidnet", "weights": "none"}


@pytest.mark.parametrize(
    ("kind", "entry", "words"),
    [
        ("baselines", BASELINE | {"network": "derived"}, ["network", "'derived'", "resnet-32"]),
        ("crossvalidations", CROSSED | {"network": "supernet"}, ["network", "'supernet'"]),
        ("crossvalidations", CROSSED | {"weights": "search"}, ["weights", "'search'", "none"]),
    ],
)
def test_entries_without_a_search_need_nothing_of_one(row, kind, entry, words):
    with pytest.raises(InputError) as caught:
        row(kind, "key", entries() | {kind: {"key": entry}})
    assert [word for word in words if word not in str(caught.value)] == []


def test_baselines_and_crossvalidations_stand_for_rows_and_transfers(row):
    document = entries() | {
        "baselines": {"key": BASELINE | {"seed": 4}},
        "crossvalidations": {"key": CROSSED | {"folds": 3}},
    }
    baseline = row("baselines", "key", document)
    assert dict(baseline.folders) == {
        "datasets": "papers/small/datasets/d",
        "rows": "papers/small/baselines/b",
    }
    assert baseline.seeds["rows"] == 4
    crossed = row("crossvalidations", "key", document)
    assert dict(crossed.folders) == {"transfers": "papers/small/crossvalidations/c"}
    assert (crossed.transfer.folds, crossed.finetune.network) == (3, "darkcovidnet")


def test_a_mistake_below_is_named_where_it_stands(row):
    document = entries(searches={"channels": 1})
    document["searches"]["below"] = document["searches"].pop("key")
    with pytest.raises(InputError, match=r"searches\.below\.channels: found 1"):
        row("rows", "key", document)


@pytest.mark.parametrize("missing", ["name", "scale", "search"])
def test_an_entry_without_a_key_it_needs(row, missing):
    document = entries()
    del document["rows"]["key"][missing]
    with pytest.raises(InputError, match=missing):
        row("rows", "key", document)
