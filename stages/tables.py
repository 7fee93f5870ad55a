"""The papers' tables, measured beside reported, one file a table and scale."""

from pathlib import Path
from typing import Any

from ssnas.artifacts import Places
from ssnas.config import ROWS, Run, load_row, read_yaml
from ssnas.report import write_table
from ssnas.report.files import read_json
from stages.common import guarded

FOLDER = Path("metrics/tables")
FIGURES = {
    "t21-b1": ("error_rate", "balanced_accuracy", "linear_balanced_accuracy"),
    "t21-2": ("binary_accuracy", "constant_binary_accuracy", "macro_auc", "linear_macro_auc"),
    "t21-3": ("accuracy", "accuracy_std", "balanced_accuracy", "balanced_accuracy_std"),
}


def tables() -> None:
    document = read_yaml(ROWS)
    for table, figures in FIGURES.items():
        entries = [
            (kind, key, entry)
            for kind in ("rows", "transfers")
            for key, entry in document[kind].items()
            if entry["table"] == table
        ]
        for scale in sorted({entry["scale"] for _, _, entry in entries}):
            rows = [
                _row(load_row(kind, key), kind, entry, figures)
                for kind, key, entry in entries
                if entry["scale"] == scale
            ]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            path = FOLDER / scale / f"{table}.csv"
            write_table(rows, columns, path, path.with_suffix(".md"))


def _row(run: Run, kind: str, entry: dict, figures: tuple[str, ...]) -> dict[str, Any]:
    """One line: figures in per cent, AUC as it is, reported ones behind the measured ones."""
    places, reported = Places(run.folders), entry.get("reported", {})
    measured = _read(places, kind, "evaluate.json" if kind == "rows" else "transfer.json")
    facts = _read(places, "rows", "finetune.json")
    data = _read(places, "datasets", "data.json")
    if kind == "transfers":
        facts, data = measured, _read(places, kind, "transfer.data.json")
    row: dict[str, Any] = {
        "row": entry["name"],
        "parameters (M)": _times(facts.get("parameters"), 1e-6),
        "reported parameters (M)": reported.get("parameters", "–"),
    }
    for figure in figures:
        per_cent = not figure.endswith("auc")
        name = f"{figure.replace('_', ' ')}{' (%)' if per_cent else ''}"
        row[name] = _times(measured.get(figure), 100 if per_cent else 1)
        if figure in reported:
            row[f"reported {name}"] = float(reported[figure])
    row["seeds"] = 1 if measured else None
    row["data"] = _provenance(data) if data else None
    row["search (s)"] = _read(places, "searches", "search.cost.json").get("seconds")
    cost = _read(places, "rows", "finetune.cost.json")
    # A transfer records no cost of its own; its row's would be another training's.
    row["training (s)"] = cost.get("seconds") if kind == "rows" else "not recorded"
    row["device"] = f"{cost['device']}, {cost['threads']} threads" if cost else None
    return row


def _provenance(data: dict) -> str:
    note = data.get("provenance") or data.get("note") or "as published"
    return f"{data['source']} ({note})"


def _read(places: Places, kind: str, name: str) -> dict[str, Any]:
    path = places.metrics(kind, name)
    return read_json(path) if path.exists() else {}


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


if __name__ == "__main__":
    guarded(tables)
