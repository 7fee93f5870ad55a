"""Genotypes, and run folders of made-up numbers."""

import csv
import json

import numpy as np

from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import OPERATIONS
from ssnas.networks.space import EDGES

OPS = tuple(OPERATIONS)

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
