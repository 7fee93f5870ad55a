"""One run folder, read once, and the words and figures that summary and report both show."""

from __future__ import annotations

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
}


@dataclass(frozen=True)
class Run:
    """What the files of a run folder say; transfer and costs are empty where they were not run."""

    folder: Path
    data: dict[str, Any]
    genotype: Genotype
    finetune: dict[str, Any]
    figures: dict[str, Any]
    per_class: pd.DataFrame
    transfer: dict[str, Any]
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
            search_cost=optional("search.cost.json"),
            finetune_cost=optional("finetune.cost.json"),
        )

    @property
    def dataset(self) -> str:
        """The data's name, as the user asked for it."""
        named = (self.data.get("name"), self.data.get("source"), self.finetune.get("dataset"))
        return str(next((name for name in named if name), "unnamed data"))

    def origin(self) -> str:
        """Where the data came from, with the head of its checksum."""
        keys = ("origin", "provenance", "note")
        parts = [str(self.data[key]) for key in keys if isinstance(self.data.get(key), str)]
        if checksum := self.data.get("sha256"):
            parts.append(f"sha256 {str(checksum)[:12]}")
        return " · ".join(parts)

    def split_sizes(self) -> str:
        """Images in each split: "train 8,000 · val 2,000 · test 10,000"."""
        sizes = self.data.get("images") or {}
        return " · ".join(f"{split} {sizes[split]:,}" for split in sizes)

    @property
    def class_figure(self) -> str:
        """What per_class.csv measures: "auc" of each label, or "recall" of each class."""
        return "auc" if "auc" in self.per_class else "recall"

    def figure_rows(self) -> list[tuple[str, str, str, str]]:
        """(title, ours, linear classifier, constant predictor) for every figure of the run."""
        return [self.figure_row(key) for key in FIGURES if key in self.figures]

    def figure_row(self, key: str) -> tuple[str, str, str, str]:
        title, percent = FIGURES[key]
        ours, linear, constant = (
            show(self.figures.get(prefix + key), percent) for prefix in ("", "linear_", "constant_")
        )
        return title, ours, linear, constant

    def sampling(self) -> str:
        """The profile and imbalance factor of the training set, and the number of classes."""
        profile, imbalance = self.data.get("profile"), self.data.get("imbalance")
        parts = [
            f"{profile} profile" if profile else None,
            f"imbalance {imbalance:g}" if isinstance(imbalance, int | float) else None,
            f"{len(self.per_class)} {'labels' if self.class_figure == 'auc' else 'classes'}",
        ]
        return " · ".join(part for part in parts if part)

    def network(self) -> str:
        parameters, operations = (self.finetune.get(key) for key in ("parameters", "multiply_adds"))
        epochs, inherited = self.finetune.get("epochs"), self.finetune.get("inherited")
        parts = [
            f"{parameters / 1e6:.2f} M parameters" if parameters else None,
            f"{operations / 1e6:.1f} M multiply-adds" if operations else None,
            f"loss {self.finetune['loss']}" if "loss" in self.finetune else None,
            f"{epochs} epochs" if epochs is not None else None,
            None if inherited is None else "weights inherited" if inherited else "from scratch",
        ]
        return " · ".join(part for part in parts if part)

    def transferred(self) -> str:
        """Where the architecture was taken and its figures there, mean ± deviation over folds."""
        if not self.transfer:
            return "not run"
        parts = [str(self.transfer.get("dataset", "")), f"{self.transfer.get('folds', '?')} folds"]
        for key, (title, percent) in FIGURES.items():
            if key in ("balanced_accuracy", "accuracy", "binary_accuracy", "macro_auc") and (
                key in self.transfer
            ):
                spread = self.transfer.get(f"{key}_std")
                mean = show(self.transfer[key], percent)
                if spread is not None:
                    mean = f"{mean.removesuffix(' %')} ± {show(spread, percent)}"
                parts.append(f"{title} {mean}")
        return " · ".join(part for part in parts if part)

    def conditions(self) -> str:
        """Scale, seed, device and the seconds that it took."""
        cost = self.finetune_cost or self.search_cost
        seed = self.finetune.get("seed")
        parts = [
            f"scale {self.finetune['scale']}" if "scale" in self.finetune else None,
            "1 seed" + (f" ({seed})" if seed is not None else ""),
            str(cost["device"]) if "device" in cost else None,
            f"search {duration(self.search_cost.get('seconds'))}",
            f"fine-tuning {duration(self.finetune_cost.get('seconds'))}",
        ]
        return " · ".join(part for part in parts if part)


def show(value: float | None, percent: bool) -> str:
    """A figure as text: per cent with two decimals, else three decimals, a dash for none."""
    if value is None or pd.isna(value):
        return "–"
    return f"{100 * value:.2f} %" if percent else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds as text, in seconds up to five minutes, then minutes, then hours."""
    if seconds is None:
        return "not run"
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def ops_in_words(edges: Sequence[Edge]) -> str:
    """How often each op occurs in a cell: "5 sep_conv_3x3, 3 skip_connect"."""
    counts, order = Counter(edge.op for edge in edges), list(OPERATIONS)
    return ", ".join(
        f"{counts[op]} {op}" for op in sorted(counts, key=lambda op: (-counts[op], order.index(op)))
    )


def provenance(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plain facts of a provenance document, nested ones as "outer inner", lists left out."""
    facts = []
    for key, value in document.items():
        words = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            facts += [(f"{words} {inner}", text) for inner, text in provenance(value)]
        elif isinstance(value, str | int | float) and value != "":
            facts.append((words, str(value)))
    return facts
