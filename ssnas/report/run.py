"""The files of one run, and the words and figures that its summary and its page both show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ssnas.networks.genotype import Edge, Genotype
from ssnas.networks.operations import OPERATIONS
from ssnas.report.files import read_csv, read_json, read_text

# key in evaluate.json: (title, whether it is shown in per cent)
FIGURES = {
    "error_rate": ("error", True),
    "accuracy": ("accuracy", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "longtail_accuracy": ("accuracy on a long-tailed test set", True),
    "many_shot": ("recall of classes with more than 100 training images", True),
    "medium_shot": ("recall of classes with 20 to 100 training images", True),
    "few_shot": ("recall of classes with fewer than 20 training images", True),
    "binary_accuracy": ("binary accuracy", True),
    "macro_auc": ("macro AUC", False),
    "macro_average_precision": ("macro average precision", False),
    "macro_f1": ("macro F1", False),
    "expected_calibration_error": ("expected calibration error", False),
    "log_loss": ("log-loss", False),
}
_DECIDED = (
    "error_rate", "balanced_accuracy", "macro_f1", "expected_calibration_error", "log_loss",
)  # fmt: skip
_DECISIONS = {
    "published": "as published (softmax of the logits)",
    "balanced": "balanced (all classes equally frequent)",
    "natural": "natural (as frequent as in training)",
    "f1": "f1 (a threshold a label)",
}
_TRANSFERRED = ("accuracy", "balanced_accuracy", "binary_accuracy", "macro_auc")
NONE = "–"


@dataclass(frozen=True)
class Run:
    """The content of a run folder; transfer and costs are empty where they were not run."""

    folder: Path
    data: dict[str, Any]
    genotype: Genotype
    finetune: dict[str, Any]
    figures: dict[str, Any]
    per_class: pd.DataFrame
    transfer: dict[str, Any]
    export: dict[str, Any]
    export_cost: dict[str, Any]
    search_cost: dict[str, Any]
    finetune_cost: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read `folder`.

        Raises:
            InputError: if a file that every run has is missing or malformed; it names `dvc repro`.
        """

        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).exists() else {}

        return cls(
            folder=folder,
            data=read_json(folder / "data.json"),
            genotype=Genotype.from_json(read_text(folder / "genotype.json")),
            finetune=read_json(folder / "finetune.json"),
            figures=read_json(folder / "evaluate.json"),
            per_class=read_csv(folder / "per_class.csv", "name", "train_images"),
            transfer=optional("transfer.json"),
            export=optional("export.json"),
            export_cost=optional("export.cost.json"),
            search_cost=optional("search.cost.json"),
            finetune_cost=optional("finetune.cost.json"),
        )

    @property
    def dataset(self) -> str:
        """The data's name, as the user asked for it."""
        names = (self.data.get("name"), self.data.get("source"), self.finetune.get("dataset"))
        return str(next(filter(None, names), "unnamed data"))

    @property
    def class_figure(self) -> str:
        """The figure in per_class.csv: "auc" of each label, or "recall" of each class."""
        return "auc" if "auc" in self.per_class else "recall"

    def sampling(self) -> str:
        """The profile and imbalance factor of the training set, and the number of classes."""
        profile, imbalance = self.data.get("profile"), self.data.get("imbalance")
        return _dotted(
            f"{profile} profile" if profile else None,
            f"imbalance {imbalance:g}" if isinstance(imbalance, int | float) else None,
            f"{len(self.per_class)} {'labels' if self.class_figure == 'auc' else 'classes'}",
        )

    @property
    def warnings(self) -> list[str]:
        """What is odd about the images, see `ssnas.data.checks`."""
        return [str(line) for line in self.data.get("warnings") or []]

    def split_sizes(self) -> str:
        """The images of each split: "train 8,000 · val 2,000 · test 10,000"."""
        sizes = self.data.get("images") or {}
        return _dotted(*(f"{split} {size:,}" for split, size in sizes.items()))

    def origin(self) -> str:
        """The source of the data, with the head of its checksum."""
        texts = (self.data.get(key) for key in ("origin", "provenance", "note"))
        checksum = self.data.get("sha256")
        return _dotted(
            *(text for text in texts if isinstance(text, str)),
            f"sha256 {str(checksum)[:12]}" if checksum else None,
        )

    def conditions(self) -> str:
        """The scale, seed and device of the run, and the time that it took."""
        cost = self.finetune_cost or self.search_cost
        scale, seed, device = (
            self.finetune.get("scale"),
            self.finetune.get("seed"),
            cost.get("device"),
        )
        return _dotted(
            f"scale {scale}" if scale else None,
            "1 seed" if seed is None else f"1 seed ({seed})",
            str(device) if device else None,
            f"search {duration(self.search_cost.get('seconds'))}",
            f"fine-tuning {duration(self.finetune_cost.get('seconds'))}",
        )

    def network(self) -> str:
        """The size of the network and how it was trained."""
        parameters, operations = (self.finetune.get(key) for key in ("parameters", "multiply_adds"))
        loss, epochs = self.finetune.get("loss"), self.finetune.get("epochs")
        inherited = self.finetune.get("inherited")
        return _dotted(
            f"{parameters / 1e6:.2f} M parameters" if parameters else None,
            f"{operations / 1e6:.1f} M multiply-adds" if operations else None,
            f"loss {loss}" if loss else None,
            None if epochs is None else f"{epochs} epochs",
            None if inherited is None else "weights inherited" if inherited else "from scratch",
        )

    def transferred(self) -> str:
        """The data set of the transfer, and the figures there as mean ± deviation over folds."""
        if not self.transfer:
            return "not run"
        figures = []
        for key in _TRANSFERRED:
            if key in self.transfer:
                title, percent = FIGURES[key]
                mean, std = self.transfer[key], self.transfer.get(f"{key}_std")
                text = show(mean, percent)
                if std is not None:
                    text = f"{text.removesuffix(' %')} ± {show(std, percent)}"
                figures.append(f"{title} {text}")
        folds = f"{self.transfer.get('folds', '?')} folds"
        return _dotted(str(self.transfer.get("dataset", "")), folds, *figures)

    def figure_rows(self) -> list[tuple[str, ...]]:
        """List every figure: title, ours, its interval, linear and constant classifier."""
        rows = [(key, *self.figure_row(key)) for key in FIGURES if key in self.figures]
        return [
            (title, ours, self.interval(key), linear, constant)
            for key, title, ours, linear, constant in rows
        ]

    def figure_row(self, key: str) -> tuple[str, str, str, str]:
        """Return a figure's title, and the figure of network, linear and constant classifier."""
        title, percent = FIGURES[key]
        ours, linear, constant = (
            show(self.figures.get(prefix + key), percent) for prefix in ("", "linear_", "constant_")
        )
        return title, ours, linear, constant

    def interval(self, key: str) -> str:
        """The 95 % interval of a figure over the choice of test images, or nothing."""
        ends = (self.figures.get("intervals") or {}).get(key)
        if not ends:
            return ""
        low, high = (show(end, FIGURES[key][1]).removesuffix(" %") for end in ends)
        return f"{low} to {high}"

    def searched(self) -> str:
        """Say whether there was a search, and where to read whether one pays."""
        seconds = self.search_cost.get("seconds")
        if not seconds:
            return "none: a fixed genotype"
        return f"{duration(seconds)}; so far a fixed genotype does as well: docs/bakeoff.md"

    def noise(self) -> str:
        """Say how far chance moves the accuracy on so few test images; nothing for several labels.

        The standard error of a share p among n images is √(p (1 − p) / n).
        """
        images = (self.data.get("images") or {}).get("test")
        accuracy = self.figures.get("accuracy")
        if not images or accuracy is None:
            return ""
        points = 100 * math.sqrt(accuracy * (1 - accuracy) / images)
        return f"{images:,} test images: the accuracy has a standard error of ± {points:.1f} points"

    @property
    def decide(self) -> str:
        """The decision that the figures are of."""
        decide = self.figures.get("decide", "published")
        return decide if isinstance(decide, str) else "the class frequencies of the place of use"

    def decision_rows(self) -> list[tuple[str, ...]]:
        """List each decision with the figures that depend on it; see `decision_head`."""
        return [
            (_DECISIONS.get(name, name), *(show(row.get(k), FIGURES[k][1]) for k in _DECIDED))
            for name, row in (self.figures.get("decisions") or {}).items()
        ]

    def decision_head(self) -> tuple[str, ...]:
        """The titles of the columns of `decision_rows`."""
        return "decision", *(FIGURES[key][0] for key in _DECIDED)

    def class_rows(self) -> list[tuple[str, str, str, str]]:
        """List each class with its training and test images and its figure."""
        return [
            (
                str(row["name"]),
                _number(row["train_images"], "{:,}"),
                _number(row.get("test_images"), "{:,}"),
                show(row[self.class_figure], percent=False),
            )
            for row in self.per_class.to_dict("records")
        ]

    def cost_rows(self) -> list[tuple[str, ...]]:
        """List search and fine-tuning with time, speed, memory, latency and device."""
        return [
            (
                stage,
                duration(cost.get("seconds")),
                _number(cost.get("images_per_second"), "{:,.0f}"),
                _number(cost.get("peak_memory_mb"), "{:,.0f} MB"),
                _number(cost.get("latency_ms_per_image"), "{:.2f} ms"),
                str(cost.get("device", NONE)),
            )
            for stage, cost in (("search", self.search_cost), ("fine-tuning", self.finetune_cost))
        ]

    def transfer_facts(self) -> list[tuple[str, str]]:
        """List what `transferred` leaves out."""
        return [fact for fact in facts(self.transfer) if fact[0] not in ("dataset", "folds")]

    def export_facts(self) -> list[tuple[str, str]]:
        """List the sizes, the agreement and the latencies of the exported model."""
        latencies = {key: value for key, value in self.export_cost.items() if "_ms_at_" in key}
        return facts(self.export | latencies)

    def provenance(self) -> list[tuple[str, str]]:
        """List the facts by which the run can be told from others and repeated."""
        cost = self.finetune_cost or self.search_cost
        made_by = {key: self.finetune.get(key) for key in ("scale", "seed", "commit")}
        made_by |= {key: cost.get(key) for key in ("device", "threads", "torch")}
        return [*((f"data: {key}", value) for key, value in facts(self.data)), *facts(made_by)]


def show(value: float | None, percent: bool) -> str:
    """Write a figure in per cent with two decimals, else with three, and none as a dash.

    >>> show(0.12345, percent=True), show(0.12345, percent=False), show(None, percent=True)
    ('12.35 %', '0.123', '–')
    """
    if value is None or pd.isna(value):
        return NONE
    return f"{100 * value:.2f} %" if percent else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Write seconds, from five minutes on as minutes and from two hours on as hours.

    >>> duration(85.4), duration(300), duration(7300), duration(None)
    ('85 s', '5 min', '2.0 h', 'not run')
    """
    if seconds is None:
        return "not run"
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ops_in_words(edges: Sequence[Edge]) -> str:
    """Count the operations of a cell, the most frequent first.

    >>> ops_in_words([Edge(0, 2, "skip_connect"), *2 * [Edge(1, 2, "sep_conv_3x3")]])
    '2 sep_conv_3x3, 1 skip_connect'
    """
    counts = Counter(edge.op for edge in edges)
    ordered = sorted(counts, key=lambda op: (-counts[op], list(OPERATIONS).index(op)))
    return ", ".join(f"{counts[op]} {op}" for op in ordered)


def facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the plain values of a document, nested ones as "outer inner"; lists are left out.

    >>> facts({"sha_256": "ab", "images": {"train": 7}, "share": 1 / 3, "classes": ["cat"]})
    [('sha 256', 'ab'), ('images train', '7'), ('share', '0.3333')]
    """
    rows = []
    for key, value in document.items():
        words = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            rows += [(f"{words} {inner}", text) for inner, text in facts(value)]
        elif isinstance(value, float):
            rows.append((words, f"{value:.4g}"))
        elif isinstance(value, str | int) and value != "":
            rows.append((words, str(value)))
    return rows


def _number(value: float | None, form: str) -> str:
    return NONE if value is None or pd.isna(value) else form.format(value)


def _dotted(*texts: str | None) -> str:
    return " · ".join(text for text in texts if text)
