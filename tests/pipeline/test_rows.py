"""Rows of every kind through their stages, on a few digits: what they leave and what it says."""

import json
from pathlib import Path

import pytest
import yaml

import ssnas.pipeline.transfer
from ssnas.config.load import load_row
from ssnas.config.systems import expand
from ssnas.data import load
from ssnas.errors import InputError
from ssnas.networks.baselines import NormalisedLinear
from ssnas.networks.genotype import Genotype
from ssnas.pipeline.artifacts import Places
from ssnas.pipeline.derive_genotype import derive_genotype
from ssnas.pipeline.evaluate import evaluate
from ssnas.pipeline.finetune import finetune
from ssnas.pipeline.make_longtail import make_longtail
from ssnas.pipeline.readers import network_of, read_splits
from ssnas.pipeline.search import run_search
from ssnas.pipeline.transfer import transfer

pytestmark = pytest.mark.slow

SCALE = {
    "data": {"largest_class": 20},
    "search": {"channels": 4, "epochs": 1, "batch_size": 8, "projector": 8, "knn_every": 0},
    "finetune": {"epochs": 1, "batch_size": 16},
    "transfer": {"epochs": 1, "folds": 2},
}
SEARCHES = {
    "ssnas": {"relaxation": "softmax", "objective": "nt-xent", "rule": "darts"},
    "random": {"epochs": 0},
    "sep": {"epochs": 0, "rule": "uniform", "op": "dil_conv_3x3"},
    "partial": {
        "relaxation": "softmax", "objective": "supervised", "rule": "darts", "partial": 2,
    },
    "balanced": {"relaxation": "softmax", "objective": "supervised", "sampling": "balanced"},
    "hls": {
        "relaxation": "softmax", "objective": "supervised", "sampling": "bilateral",
        "heterogeneous": True,
    },
}  # fmt: skip
ROWS = {
    "ssnas": {"cells": 4, "channels": 6, "inherit": False, "pretrain_epochs": 1},
    "random": {"inherit": False, "loss": "ldam-drw"},
    "sep": {"inherit": False},
    "partial": {"inherit": False},
    "balanced": {"network": "supernet", "epochs": 0, "loss": "ce"},
    "hls": {"network": "supernet", "epochs": 0, "loss": "ce", "sampling": "bilateral"},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a params.yaml and a rows.yaml, expanded from these systems."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump({"scales": {"small": SCALE}}))
    Path("papers").mkdir()

    def write(**systems):
        systems = {"datasets": {"digits": {"dataset": "digits"}}} | systems
        Path("papers/rows.yaml").write_text(yaml.safe_dump(expand(systems, ["small"])))
        make_longtail(load_row("datasets", "small-digits"))

    return write


def read(run, kind, name):
    return json.loads(Places.of(run).metrics(kind, name).read_text())


def made(name, search, row, project):
    """The run of one row after its search, training and test."""
    project(searches={name: search | {"dataset": "digits"}}, rows={name: row | {"search": name}})
    for stage in (run_search, derive_genotype):
        stage(load_row("searches", f"small-{name}"))
    run = load_row("rows", f"small-{name}")
    finetune(run)
    evaluate(run)
    return run


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_rows_of_the_papers_run(project, name):
    run = made(name, SEARCHES[name], ROWS[name], project)
    figures = read(run, "rows", "evaluate.json")
    assert 0 <= figures["balanced_accuracy"] <= 1
    assert 0 <= figures["longtail_accuracy"] <= 1
    facts = read(run, "rows", "finetune.json")
    assert facts["parameters"] > 0
    assert facts["epochs"] == ROWS[name].get("epochs", 1)
    genotype = Genotype.from_json(Places.of(run).metrics("searches", "genotype.json").read_text())
    if name == "sep":
        assert {edge.op for edge in genotype.normal} == {"dil_conv_3x3"}
        assert len(genotype.normal) == len(genotype.reduce) == 14
    assert ("mixing_ratio" in figures) == (name == "hls")
    if name == "hls":
        halfway = next(point for point in figures["mixing_ratio"] if point["ratio"] == 0.5)
        assert halfway["accuracy"] == pytest.approx(figures["accuracy"])


def test_training_goes_on_from_the_searched_supernet(project):
    """Continuous learning: without a step it is the searched network, with steps another."""
    project(
        searches={"hls": SEARCHES["hls"] | {"dataset": "digits"}},
        rows={
            "hls": ROWS["hls"] | {"search": "hls"},
            "on": ROWS["hls"] | {"search": "hls", "epochs": 1, "freeze_backbone": True},
        },
    )
    for stage in (run_search, derive_genotype):
        stage(load_row("searches", "small-hls"))
    sizes = {}
    for name in ("hls", "on"):
        run = load_row("rows", f"small-{name}")
        finetune(run)
        sizes[name] = Places.of(run).network.read_bytes()
    assert sizes["hls"] != sizes["on"]


def test_a_network_cannot_inherit_another_size(project):
    with pytest.raises(InputError, match="the same channels and cells"):
        made("deep", SEARCHES["random"], {"channels": 6}, project)


@pytest.mark.parametrize(
    ("search", "row", "message"),
    [
        (
            "random",
            {"network": "supernet"},
            r"finetune\.network: found 'supernet'",
        ),
        ("balanced", ROWS["balanced"] | {"cells": 4}, r"finetune\.cells: found 4.*derived"),
        ("balanced", ROWS["balanced"] | {"loss": "ldam-drw"}, "loss other than ldam-drw"),
        ("partial", {}, r"search\.partial 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(project, search, row, message):
    with pytest.raises(InputError, match=message):
        made("odd", SEARCHES[search], row, project)


def test_a_flip_of_ones_own_goes_with_the_splits(project):
    project(datasets={"digits": {"dataset": "digits", "flip": True}})
    run = load_row("datasets", "small-digits")
    assert read_splits(run).flip
    assert not load("digits", Path("data/raw"), None, "keep", "error").flip


def test_a_crossvalidation_trains_the_network_of_its_own_loss(project, monkeypatch):
    """LDAM's cosine classifier, although the row's loss, a default, is another."""
    built = []
    monkeypatch.setattr(
        ssnas.pipeline.transfer, "network_of", lambda *a: built.append(network_of(*a)) or built[-1]
    )
    entry = {"dataset": "digits", "network": "resnet-32", "weights": "none", "loss": "ldam-drw"}
    project(crossvalidations={"c": entry})
    transfer(load_row("crossvalidations", "small-c"))
    assert {type(network.classifier) for network in built} == {NormalisedLinear}


@pytest.mark.parametrize("network", ["resnet-32", "darkcovidnet"])
def test_baselines_run_without_a_search(project, network):
    project(baselines={"b": {"dataset": "digits", "network": network, "loss": "focal"}})
    run = load_row("baselines", "small-b")
    finetune(run)
    evaluate(run)
    assert read(run, "rows", "finetune.json")["network"] == network
    assert not read(run, "rows", "finetune.json")["inherited"]
    assert "accuracy" in read(run, "rows", "evaluate.json")


def test_a_crossvalidation_needs_no_row(project):
    project(
        crossvalidations={
            "c": {"dataset": "digits", "network": "resnet-32", "weights": "none", "loss": "ce"}
        }
    )
    run = load_row("crossvalidations", "small-c")
    transfer(run)
    found = read(run, "transfers", "transfer.json")
    assert found["folds"] == 2
    assert found["test_images"] == len(
        load("digits", Path("data/raw"), None, "keep", "error").train
    )
    assert read(run, "transfers", "transfer.cost.json")["seconds"] > 0
