"""Pictures, tables, summary and HTML report of a run folder of made-up numbers."""

import base64
import csv
import io
import json
import re
import warnings
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ssnas.errors import InputError
from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.space import EDGES, OPS
from ssnas.report.cells import HALF_SIZE, PANEL, PLACES, WIDTH, arrange, draw_genotype
from ssnas.report.files import read_csv
from ssnas.report.page import write_html
from ssnas.report.papers.tables import plus_minus, write_table
from ssnas.report.pictures import (
    alpha_picture,
    class_counts_picture,
    confusion_picture,
    curves_picture,
    per_class_picture,
)
from ssnas.report.style import KINDS
from ssnas.report.style import OPS as STYLED_OPS
from ssnas.report.summary import summary

SVG = "http://www.w3.org/2000/svg"
NASTY = """<b> & "q" 'a' $x$ $y$"""
DARTS_V2 = Genotype(
    normal=(
        (0, 2, "sep_conv_3x3"),
        (1, 2, "sep_conv_3x3"),
        (0, 3, "sep_conv_3x3"),
        (1, 3, "sep_conv_3x3"),
        (1, 4, "sep_conv_3x3"),
        (0, 4, "skip_connect"),
        (0, 5, "skip_connect"),
        (2, 5, "dil_conv_3x3"),
    ),
    reduce=(
        (0, 2, "max_pool_3x3"),
        (1, 2, "max_pool_3x3"),
        (2, 3, "skip_connect"),
        (1, 3, "max_pool_3x3"),
        (0, 4, "max_pool_3x3"),
        (2, 4, "skip_connect"),
        (2, 5, "skip_connect"),
        (1, 5, "max_pool_3x3"),
    ),
)
ARGMAX = Genotype(
    normal=tuple(Edge(*edge, OPS[1 + (3 * i) % 7]) for i, edge in enumerate(EDGES)),
    reduce=tuple(Edge(*edge, "avg_pool_3x3") for edge in EDGES),
)
THRESHOLD = Genotype(
    normal=tuple(
        Edge(source, target, op)
        for source, target in ((0, 2), (1, 3), (2, 4), (4, 5))
        for op in ("sep_conv_5x5", "skip_connect")
    ),
    reduce=tuple(Edge(0, target, "max_pool_3x3") for target in range(2, 6)),
)
GENOTYPES = {"darts": DARTS_V2, "argmax": ARGMAX, "threshold": THRESHOLD}


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_run(folder, names=("cat", "dog", NASTY), multi_label=False):
    """A whole run folder of made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    train = [max(2, round(1000 * 0.05 ** (i / max(1, len(names) - 1)))) for i in range(len(names))]
    write_csv(
        folder / "class_counts.csv",
        ("class", "name", "before", "train", "val", "test"),
        [
            (i, name, 1250, n, 250, 100)
            for i, (name, n) in enumerate(zip(names, train, strict=True))
        ],
    )
    scores = np.linspace(0.95, 0.35, len(names)).round(3)
    write_csv(
        folder / "per_class.csv",
        ("name", "train_images", "test_images", "auc" if multi_label else "recall"),
        [(name, n, 100, s) for name, n, s in zip(names, train, scores, strict=True)],
    )
    if not multi_label:
        rng = np.random.default_rng(0)
        write_csv(
            folder / "confusion.csv",
            ("actual", "predicted", "count"),
            [(a, p, int(rng.integers(9)) + 70 * (a == p)) for a in names for p in names],
        )
    write_curves(folder, multi_label)
    write_facts(folder, multi_label)
    (folder / "genotype.svg").write_text(f"<svg xmlns='{SVG}'/>", encoding="utf-8")
    (folder / "genotype.png").touch()


def write_curves(folder, multi_label, epochs=12):
    write_csv(
        folder / "search.csv",
        [
            "epoch",
            "loss_weights",
            "loss_alpha",
            "loss_zero_one",
            "learning_rate",
            "skip_normal",
            "skip_reduce",
            "decided",
            "knn_accuracy",
            "images_per_second",
        ],
        [
            (e, 30 / e, 33 / e, -0.02 * e, 0.025, e // 4, e // 5, e / 20, 0.3 + e / 40, 200)
            for e in range(1, epochs + 1)
        ],
    )
    measured = {True: ("binary_accuracy", "macro_auc"), False: ("accuracy", "balanced_accuracy")}
    write_csv(
        folder / "finetune.csv",
        ("epoch", "loss", "learning_rate", *(f"val_{key}" for key in measured[multi_label])),
        [(e, 2 / e, 0.025 / e, 0.5 + e / 40, 0.4 + e / 40) for e in range(1, epochs + 1)],
    )
    write_csv(
        folder / "alpha.csv",
        ("epoch", "cell", "edge", "op", "weight"),
        [
            (e, cell, f"{source}->{target}", op, 1 / (1 + np.exp(-e * (i - 3) / 12)))
            for e in range(1, epochs + 1)
            for cell in ("normal", "reduce")
            for source, target in EDGES
            for i, op in enumerate(OPS[1:])
        ],
    )


def write_facts(folder, multi_label):
    keys = ("binary_accuracy", "macro_auc") if multi_label else ("error_rate", "balanced_accuracy")
    ours, linear, constant = ((0.1234, 0.8765), (0.4321, 0.5432), (0.9012, 0.5))
    figures = dict(zip(keys, ours, strict=True))
    figures |= {f"linear_{key}": value for key, value in zip(keys, linear, strict=True)}
    figures |= {f"constant_{key}": value for key, value in zip(keys, constant, strict=True)}
    cost = {"seconds": 85.4, "images_per_second": 210.0, "device": "cpu", "torch": "2.9.9"}
    documents = {
        "evaluate": figures,
        "data": {
            "source": f"toy {NASTY}",
            "origin": "made up for this test",
            "sha256": "0123456789abcdef" * 4,
            "profile": "exponential",
            "imbalance": 20,
            "images": {"train": 1274, "val": 750, "test": 300},
            "classes": ["a list", "is left out"],
        },
        "finetune": {
            "parameters": 812345,
            "multiply_adds": 123400000,
            "loss": "focal+la",
            "epochs": 12,
            "inherited": True,
            "scale": "small",
            "seed": 7,
            "commit": "c0ffee1",
        },
        "search.cost": cost,
        "finetune.cost": cost | {"seconds": 7300, "latency_ms_per_image": 1.25},
        "transfer": {
            "dataset": "xray",
            "folds": 5,
            "balanced_accuracy": 0.9512,
            "balanced_accuracy_std": 0.0123,
        },
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "genotype.json").write_text(DARTS_V2.to_json(), encoding="utf-8")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "main"
    write_run(folder)
    return folder


# --- the cell drawing


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("genotype", GENOTYPES.values(), ids=GENOTYPES)
def test_labels_of_a_cell_overlap_neither_each_other_nor_a_state(genotype, cell):
    edges = getattr(genotype, cell)
    labels = [arrow for arrow in arrange(edges) if arrow.op is not None]
    assert [(label.source, label.target, label.op) for label in labels] == list(edges)
    boxes = [(label.label_place, label.label_size) for label in labels]
    for place, size in boxes:
        assert (place - size >= 0).all()
        assert (place + size <= (WIDTH, PANEL)).all()
    states = list(zip(PLACES, HALF_SIZE, strict=True))
    pairs = [*combinations(boxes, 2), *((box, state) for box in boxes for state in states)]
    for (place, size), (other, other_size) in pairs:
        assert (np.abs(place - other) >= size + other_size).any()


def test_two_ops_on_one_edge_take_two_ways():
    bends = {}
    for arrow in arrange(THRESHOLD.normal):
        bends.setdefault((arrow.source, arrow.target), []).append(arrow.bend)
    doubled = [pair for pair in bends.values() if len(pair) == 2]
    assert len(doubled) == 4
    assert all(abs(a - b) > 0.15 for a, b in doubled)


def test_drawing_shows_every_op_and_state_and_is_reproducible(tmp_path):
    files = [(tmp_path / f"{i}.png", tmp_path / f"{i}.svg") for i in range(2)]
    for png, svg in files:
        draw_genotype(ARGMAX, png, svg)
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert files[0][1].read_bytes() == files[1][1].read_bytes()
    words = re.findall(r"<text[^>]*>([^<]+)</text>", files[0][1].read_text(encoding="utf-8"))
    for op in OPS[1:]:
        expected = sum(edge.op == op for edge in (*ARGMAX.normal, *ARGMAX.reduce))
        assert words.count(op) == expected
    for state in ("cₖ₋₂", "cₖ₋₁", "cₖ", "0", "1", "2", "3"):
        assert words.count(state) == 2
    assert {"Normal cell", "Reduction cell", "pooling"} <= set(words)
    with Image.open(files[0][0]) as image:
        assert image.width == 1800
        assert "Software" not in image.info


def test_every_op_of_the_space_has_a_style():
    assert set(STYLED_OPS) == set(OPS)
    assert {kind for kind, _ in STYLED_OPS.values()} == set(KINDS)


@pytest.mark.parametrize("colour", KINDS.values(), ids=KINDS)
def test_white_text_on_an_op_colour_is_readable(colour):
    """Contrast ratio of WCAG 2.1, 1.4.3; "none" never stands in a genotype, large text there."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    ratio = 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05)
    assert ratio >= (3 if colour == KINDS["none"] else 4.5)


# --- the other pictures


@pytest.mark.parametrize("classes", [1, 14, 100])
def test_pictures_of_any_number_of_long_class_names(tmp_path, classes):
    names = [f"{i:03d} a class with a rather long name" for i in range(classes)]
    rows = [(i, name, 500, 500 - 4 * i, 1, 1) for i, name in enumerate(names)]
    header = ("class", "name", "before", "train", "val", "test")
    write_csv(tmp_path / "class_counts.csv", header, rows)
    figures = [(name, 500 - 4 * i, 1, 0.5) for i, name in enumerate(names)]
    write_csv(
        tmp_path / "per_class.csv", ("name", "train_images", "test_images", "recall"), figures
    )
    for name, draw in (("class_counts", class_counts_picture), ("per_class", per_class_picture)):
        draw(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.height < image.width < 2400


def test_confusion_of_a_class_without_test_images_divides_by_no_zero(tmp_path):
    rows = [("cat", "cat", 3), ("cat", "dog", 1), ("dog", "cat", 0), ("dog", "dog", 0)]
    write_csv(tmp_path / "confusion.csv", ("actual", "predicted", "count"), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_picture(tmp_path / "confusion.csv", tmp_path / "confusion.png")


def test_alpha_of_one_cell_and_few_edges(tmp_path):
    rows = [(epoch, "normal", "0->2", op, 0.5) for epoch in (1, 2) for op in OPS]
    write_csv(tmp_path / "alpha.csv", ("epoch", "cell", "edge", "op", "weight"), rows)
    alpha_picture(tmp_path / "alpha.csv", tmp_path / "alpha.png")
    with Image.open(tmp_path / "alpha.png") as image:
        assert image.width == 11 * 160


def test_curves_need_neither_a_search_nor_every_column(run_folder, tmp_path):
    write_csv(tmp_path / "finetune.csv", ("epoch", "loss"), [(1, 2.0), (2, 1.0)])
    curves_picture(None, tmp_path / "finetune.csv", tmp_path / "little.png")
    curves_picture(run_folder / "search.csv", None, tmp_path / "search.png")
    heights = []
    for name in ("little", "search"):
        with Image.open(tmp_path / f"{name}.png") as image:
            heights.append(image.height)
    assert heights[1] == 2 * heights[0]  # six panels take two rows, one panel takes one


# --- tables


def test_table_cells(tmp_path):
    rows = [{"method": "a|b", "error": "1.0"}, {"method": "paper\nonly", "error": "not run"}]
    write_table(rows, tmp_path / "v1.5", "A heading")
    with (tmp_path / "v1.5.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert (tmp_path / "v1.5.md").read_text(encoding="utf-8") == (
        "A heading\n\n"
        "| method     | error   |\n"
        "| ---------- | ------- |\n"
        "| a\\|b       | 1.0     |\n"
        "| paper only | not run |\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10.914, 0.126, 3), "10.91 ± 0.13 (3)"),
        ((10.914, 0.126, 3, 1), "10.9 ± 0.1 (3)"),
        ((10.914, 0.0, 1), "10.91 (1)"),
        ((10.914, None, 2), "10.91 (2)"),
    ],
)
def test_plus_minus(arguments, text):
    assert plus_minus(*arguments) == text


# --- the summary


def test_summary_says_what_the_files_say(run_folder):
    text = summary(run_folder)
    words = " ".join(text.split())
    for expected in (
        "error 12.34 % 43.21 % 90.12 %",
        "balanced accuracy 87.65 % 54.32 % 50.00 %",
        "exponential profile · imbalance 20 · 3 classes",
        "train 1,274 · val 750 · test 300",
        "made up for this test · sha256 0123456789ab",
        "5 sep_conv_3x3, 2 skip_connect, 1 dil_conv_3x3",
        "0.81 M parameters",
        "cat 0.95, dog 0.65",
        "xray · 5 folds · balanced accuracy 95.12 ± 1.23 %",
        "scale small · 1 seed (7) · cpu · search 85 s · fine-tuning 2.0 h",
        "main/report.html",
        "genotype.png",
    ):
        assert expected in words, expected


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [2, 14, 100])
def test_summary_fits_a_terminal(tmp_path, classes, multi_label):
    folder = tmp_path / "a run of a rather long name" / ("x" * 60)
    write_run(folder, [f"class number {i} " + "y" * 40 for i in range(classes)], multi_label)
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    data |= {"source": "path/" * 30, "origin": "a long story " * 40}
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "genotype.json").write_text(ARGMAX.to_json(), encoding="utf-8")
    cost = {"seconds": 1e6, "device": "a device of a long name " * 4}
    (folder / "finetune.cost.json").write_text(json.dumps(cost), encoding="utf-8")
    transfer = {"dataset": "somewhere else " * 12, "folds": 5, "macro_auc": 0.5}
    (folder / "transfer.json").write_text(json.dumps(transfer), encoding="utf-8")
    lines = summary(folder).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 88
    assert ("AUC" in "".join(line[:8] for line in lines)) == multi_label


def test_summary_without_transfer_and_optional_keys(tmp_path):
    write_run(tmp_path)
    (tmp_path / "transfer.json").unlink()
    for name in ("data", "finetune"):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")
    words = " ".join(summary(tmp_path).split())
    assert "transfer not run" in words
    assert "unnamed data · 3 classes" in words


@pytest.mark.parametrize("entry", [summary, lambda folder: write_html(folder, folder / "r.html")])
@pytest.mark.parametrize(
    "name", ["data.json", "genotype.json", "finetune.json", "evaluate.json", "per_class.csv"]
)
def test_missing_file_names_the_command_that_makes_it(run_folder, tmp_path, entry, name):
    for file in run_folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*dvc repro"):
        entry(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "cannot be read"),
        ("name,train_images\n", "no rows"),
        ("a,b\n1,2\n", "train_images|name"),
    ],
)
def test_malformed_csv_is_an_input_error(tmp_path, content, complaint):
    path = tmp_path / "per_class.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=complaint):
        per_class_picture(path, tmp_path / "x.png")


@pytest.mark.parametrize("name", ["NA", "nan", "None", "007", "1e3", "true"])
def test_class_names_stay_text(tmp_path, name):
    header, row = ("name", "actual", "train_images", "recall"), (name, name, 3, "")
    write_csv(tmp_path / "per_class.csv", header, [row])
    table = read_csv(tmp_path / "per_class.csv", "name")
    assert table["name"].tolist() == table["actual"].tolist() == [name]
    assert table["train_images"].tolist() == [3]
    assert table["recall"].isna().all()


# --- the HTML report


class Page(HTMLParser):
    """Texts, attributes and balance of an HTML page."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.texts, self.links, self.tags, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_report_is_whole_self_contained_escaped_and_reproducible(run_folder, tmp_path):
    out = tmp_path / "deep" / "report.html"
    write_html(run_folder, out)
    write_html(run_folder, tmp_path / "again.html")
    assert out.read_bytes() == (tmp_path / "again.html").read_bytes()
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"b", "script", "link"} & set(page.tags)
    assert NASTY in page.texts  # the class name, read back by a parser
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("img") == 6
    for expected in ("12.34 %", "43.21 %", "90.12 %", "c0ffee1", "2.9.9", "0123456789abcdef" * 4):
        assert expected in page.texts, expected
    embedded = [base64.b64decode(link.split(",", 1)[1]) for link in page.links]
    assert embedded[0] == (run_folder / "genotype.svg").read_bytes()
    for content in embedded[1:]:
        with Image.open(io.BytesIO(content)) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # not blank


def test_report_of_multi_label_data_leaves_out_what_was_not_run(tmp_path):
    write_run(tmp_path, multi_label=True)
    for name in ("search.csv", "alpha.csv", "transfer.json", "search.cost.json"):
        (tmp_path / name).unlink()
    write_html(tmp_path, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 4  # cells, counts, per label, fine-tuning curves
    assert "binary accuracy" in page.texts
    assert "0.876" in page.texts
    assert page.texts.count("not run") == 2  # the transfer and the time of the search


def test_report_of_a_run_without_epochs_has_no_curves(tmp_path):
    write_run(tmp_path, multi_label=True)
    for name in ("search.csv", "finetune.csv", "alpha.csv"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
    write_html(tmp_path, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 3  # cells, counts, per label
