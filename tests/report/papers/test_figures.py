"""The papers' figures from small made-up results."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from ssnas.config.load import read_yaml
from ssnas.config.systems import SYSTEMS
from ssnas.errors import InputError
from ssnas.report.papers.figures import FIGURE_KINDS, PaperFigure, read_figures, write_figure
from ssnas.report.papers.records import Records
from stages import figures as stage

ROOT = Path(__file__).resolve().parents[3]
ALPHA = """epoch,cell,edge,op,weight
1,normal,0->2,none,0.9
1,normal,0->2,skip_connect,0.3
1,normal,0->2,sep_conv_3x3,0.2
1,reduce,0->2,none,0.0
1,reduce,0->2,skip_connect,0.1
1,reduce,0->2,sep_conv_3x3,0.2
1,instance,0->2,skip_connect,0.1
1,instance,0->2,sep_conv_3x3,0.2
2,normal,0->2,none,0.1
2,normal,0->2,skip_connect,0.3
2,normal,0->2,sep_conv_3x3,0.2
2,reduce,0->2,none,0.0
2,reduce,0->2,skip_connect,0.3
2,reduce,0->2,sep_conv_3x3,0.2
2,instance,0->2,skip_connect,0.3
2,instance,0->2,sep_conv_3x3,0.2
3,normal,0->2,none,0.1
3,normal,0->2,skip_connect,0.1
3,normal,0->2,sep_conv_3x3,0.2
3,reduce,0->2,none,0.0
3,reduce,0->2,skip_connect,0.1
3,reduce,0->2,sep_conv_3x3,0.2
3,instance,0->2,skip_connect,0.3
3,instance,0->2,sep_conv_3x3,0.2
"""
SWEEP = [
    {"ratio": 1.0, "accuracy": 0.25, "balanced_accuracy": 0.2},
    {"ratio": 0.0, "accuracy": 0.5, "balanced_accuracy": 0.4},
]


def contents(kind, genotype):
    """A file that a system of this `kind` of figure leaves, as text."""
    return {
        "distributions": "class,name,before,train,val,test\n0,007,9,7,1,2\n1,dog,9,3,1,2\n",
        "training-curves": (
            "epoch,loss,val_accuracy,val_balanced_accuracy\n1,2.5,0.5,0.25\n2,2.0,0.75,0.5\n"
        ),
        "cells": genotype.to_json(),
        "mixing-ratio": json.dumps({"accuracy": 0.5, "mixing_ratio": SWEEP}),
        "chosen-ops": ALPHA,
    }[kind]


@pytest.fixture
def draw(tmp_path, genotype):
    """Writes a figure of systems A and B from texts (None: has not run); returns its path."""

    def write(kind, **texts):
        entries, file = FIGURE_KINDS[kind].entries, FIGURE_KINDS[kind].file
        document = {
            label: {"name": label, "system": label, "scale": "small", "seed": 0} for label in texts
        }
        records = Records({entries: document}, tmp_path)
        for label, text in texts.items():
            path = tmp_path / "small" / entries / label / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text, encoding="utf-8")
        figure = PaperFigure("A $title$ & more", kind, {label: label for label in texts})
        write_figure(figure, "small", records, tmp_path / "figures" / "v1.5")
        return tmp_path / "figures" / "v1.5"

    return write


def csv(target):
    return pd.read_csv(f"{target}.csv", keep_default_na=False)


def words(target):
    root = ElementTree.parse(f"{target}.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return " ".join(" ".join(root.itertext()).split())


@pytest.mark.parametrize("kind", FIGURE_KINDS)
def test_every_kind_writes_its_numbers_and_two_pictures(draw, genotype, kind):
    text = contents(kind, genotype)
    target = draw(kind, A=text, B=text, C=None)
    table = csv(target)
    assert list(dict.fromkeys(table["system"])) == ["A", "B"]
    assert (table["system"] == "A").sum() == (table["system"] == "B").sum()
    with Image.open(f"{target}.png") as image:
        image.load()
        assert image.width == 1440
    shown = words(target)
    assert "A $title$ & more" in shown
    assert "Scale small" in shown
    assert "not run: C" in shown
    first = [Path(f"{target}.{end}").read_bytes() for end in ("csv", "png", "svg")]
    draw(kind, A=text, B=text, C=None)
    assert [Path(f"{target}.{end}").read_bytes() for end in ("csv", "png", "svg")] == first


def test_distribution_holds_the_training_images_of_each_class(draw, genotype):
    table = csv(draw("distributions", A=contents("distributions", genotype)))
    assert list(table.itertuples(index=False, name=None)) == [
        ("A", 0, "007", 7),
        ("A", 1, "dog", 3),
    ]


def test_training_curves_are_of_validation_images_and_say_so(draw, genotype):
    target = draw("training-curves", A=contents("training-curves", genotype))
    expected = {
        "system": ["A", "A"],
        "epoch": [1, 2],
        "val_balanced_accuracy": [0.25, 0.5],
        "val_accuracy": [0.5, 0.75],
    }
    assert csv(target).to_dict("list") == expected
    assert "curves are of validation images: the test images are read once" in words(target)


def test_cells_show_every_edge_of_every_search(draw, genotype):
    target = draw("cells", DARTS=genotype.to_json(), Fair=genotype.to_json())
    table = csv(target)
    edges = [("normal", *edge) for edge in genotype.normal]
    edges += [("reduce", *edge) for edge in genotype.reduce]
    for label in ("DARTS", "Fair"):
        part = table[table["system"] == label].drop(columns="system")
        assert list(part.itertuples(index=False, name=None)) == edges
    shown = words(target)
    assert shown.index("DARTS") < shown.index("Fair")
    assert shown.count("Reduction cell") == 2
    assert shown.count("dil_conv_3x3") == 4
    assert shown.count("skip_connect") == 12


def test_mixing_ratio_is_sorted_by_ratio(draw, genotype):
    table = csv(draw("mixing-ratio", A=contents("mixing-ratio", genotype)))
    assert table.to_dict("list") == {
        "system": ["A", "A"],
        "ratio": [0.0, 1.0],
        "accuracy": [0.5, 0.25],
    }


def test_changes_count_the_backbone_and_pass_over_none(draw):
    """Epoch 2: reduce changes; the weight of `none` falls and the head changes, which is no matter.

    Epoch 3: both cells change.
    """
    table = csv(draw("chosen-ops", A=ALPHA))
    assert table.to_dict("list") == {"system": ["A", "A"], "epoch": [2, 3], "changed": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "damaged", "message"),
    [
        ("distributions", "class,name,train\n0,cat,many\n", "train: found 'many'"),
        ("training-curves", "epoch,loss,val_accuracy,val_balanced_accuracy\n", "no rows"),
        ("cells", '{"normal": []}', "cannot be read"),
        ("mixing-ratio", '{"accuracy": 0.5}', "mixing_ratio: found None"),
        ("mixing-ratio", '{"mixing_ratio": [{"ratio": 0}]}', "mixing_ratio: found"),
        ("mixing-ratio", '{"mixing_ratio": [{"ratio": 0, "accuracy": NaN}]}', "accuracy: found"),
        ("chosen-ops", ALPHA[: ALPHA.index("2,normal")], "found 1 epochs of 2 edges"),
        ("chosen-ops", ALPHA[: ALPHA.index("3,reduce")], "each with all edges"),
    ],
)
def test_a_damaged_file_leaves_out_its_system_alone(draw, genotype, caplog, kind, damaged, message):
    target = draw(kind, A=damaged, B=contents(kind, genotype))
    assert set(csv(target)["system"]) == {"B"}
    assert "file not usable: A" in words(target)
    assert "v1.5: 'A' is left out" in caplog.text
    assert message in caplog.text


def test_a_figure_without_any_system_is_removed(draw, genotype):
    target = draw("cells", A=genotype.to_json())
    draw("cells", A=None)
    assert not list(target.parent.iterdir())
    draw("cells", A="not JSON")
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "pie"}, "fig.kind: found 'pie'; choose from distributions, training-curves"),
        ({"kind": ["cells"]}, "fig.kind: found"),
        ({"systems": {}}, "fig.systems: found {}; accepted is a mapping"),
        ({"title": 3}, "fig.title: found 3; accepted is text"),
        ({"systems": {"A": "b"}}, "fig.systems.A: found 'b'; choose from a"),
        ({"color": "red"}, "fig.color: unknown key"),
        (None, "fig: the key 'title' is missing"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, entry, message):
    path = tmp_path / "figures.yaml"
    right = {"title": "Cells", "kind": "cells", "systems": {"A": "a"}}
    path.write_text(yaml.safe_dump({"fig": {} if entry is None else right | entry}))
    known = {"a": {"name": "a", "system": "a", "scale": "small", "seed": 0}}
    with pytest.raises(InputError) as caught:
        read_figures(path, Records({"searches": known}, tmp_path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_the_papers_figures_are_of_systems_that_are_declared(tmp_path, monkeypatch):
    """Nothing has run in the copy, so nothing is drawn."""
    shutil.copytree(ROOT / "papers", tmp_path / "papers")
    monkeypatch.chdir(tmp_path)
    stage.figures()
    assert not (tmp_path / "metrics").exists()
    figures, systems = read_figures(stage.FIGURES, Records.read()), read_yaml(SYSTEMS)
    assert {figure.kind for figure in figures.values()} == set(FIGURE_KINDS)
    for figure in figures.values():
        assert set(figure.systems.values()) <= systems[FIGURE_KINDS[figure.kind].entries].keys()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with one figure of two data sets: `step` has two seeds, `even` two scales."""
    monkeypatch.chdir(tmp_path)
    datasets = {
        "small-step-seed1": {"name": "step-seed1", "system": "step", "scale": "small", "seed": 1},
        "small-step": {"name": "step", "system": "step", "scale": "small", "seed": 0},
        "small-even": {"name": "even", "system": "even", "scale": "small", "seed": 0},
        "paper-even": {"name": "even", "system": "even", "scale": "paper", "seed": 0},
        "small-other": {"name": "other", "system": "other", "scale": "small", "seed": 0},
    }
    systems = {"Step": "step", "Even": "even"}
    figure = {"title": "Images", "kind": "distributions", "systems": systems}
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/rows.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    (tmp_path / "papers/figures.yaml").write_text(yaml.safe_dump({"y24-6": figure}))
    return tmp_path


def leave(project, folder, images):
    path = project / "papers/metrics" / folder / "class_counts.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"class,name,train\n0,cat,{images}\n")


def test_stage_draws_the_first_seed_that_has_run_at_each_scale(project):
    leave(project, "small/datasets/step-seed1", 11)
    stage.figures()
    folder = project / "papers/figures"
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert written == ["small/y24-6.csv", "small/y24-6.png", "small/y24-6.svg"]
    assert csv(folder / "small/y24-6")["images"].tolist() == [11]
    assert "not run: Even" in words(folder / "small/y24-6")

    leave(project, "small/datasets/step", 10)
    leave(project, "paper/datasets/even", 99)
    stage.figures()
    assert csv(folder / "small/y24-6")["images"].tolist() == [10]
    assert csv(folder / "paper/y24-6")["images"].tolist() == [99]
    assert "Scale paper · one seed each · not run: Step" in words(folder / "paper/y24-6")


def test_stage_refuses_a_system_that_no_entry_is_of(project):
    path = project / "papers/figures.yaml"
    path.write_text(path.read_text().replace("even", "evn"))
    with pytest.raises(InputError, match=r"systems\.Even: found 'evn'; choose from"):
        stage.figures()
