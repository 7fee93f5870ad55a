"""The entries of papers/rows.yaml and what their runs wrote, for the tables and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssnas.config.load import ROWS, read_yaml
from ssnas.errors import InputError
from ssnas.report.files import read_json

METRICS = Path("metrics/papers")

_TRAINED = {
    "figures": "evaluate.json",
    "network": "finetune.json",
    "training": "finetune.cost.json",
}
_CROSS_VALIDATED = {
    "figures": "transfer.json",
    "network": "transfer.json",
    "training": "transfer.cost.json",
    "data": "transfer.data.json",
}
# The kinds of entries that have test figures, and the files of such an entry by what they tell.
TESTED = {
    "rows": _TRAINED,
    "baselines": _TRAINED,
    "transfers": _CROSS_VALIDATED,
    "crossvalidations": _CROSS_VALIDATED,
}


def cross_validated(kind: str) -> bool:
    """Whether the test figures of a kind of entry are means over folds."""
    return TESTED[kind] is _CROSS_VALIDATED


@dataclass(frozen=True)
class Record:
    """What the run of one seed of a system wrote.

    Attributes:
        folder: its own files.
        files: those that a table reads by what they tell, also the search's and the data set's.
    """

    seed: int
    folder: Path
    files: Mapping[str, Path]

    @property
    def has_run(self) -> bool:
        return self.files["figures"].exists()

    def read(self, what: str) -> dict[str, Any]:
        """One of its files, empty where it has not been written.

        Raises:
            InputError: if it is malformed.
        """
        path = self.files.get(what)
        return read_json(path) if path and path.exists() else {}

    def number(self, what: str, key: str) -> float | None:
        """A number in one of its files.

        Raises:
            InputError: if the file is malformed, or the value is not a finite number.
        """
        value = self.read(what).get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(
                f"{self.files[what]}: {key}: found {value!r}; accepted is a finite number"
            )
        return float(value)


class Records:
    """The entries of papers/rows.yaml by kind, system and scale.

    Args:
        document: the content of papers/rows.yaml.
        root: the folder of the entries' metrics.

    Raises:
        InputError: if an entry lacks one of the keys that all have.
    """

    def __init__(self, document: Mapping[str, Any], root: Path = METRICS) -> None:
        self._root = root
        self._entries: dict[str, list[Mapping[str, Any]]] = {}
        for kind, declared in document.items():
            entries = declared or {}
            for key, entry in entries.items():
                for needed in ("name", "system", "scale", "seed"):
                    if needed not in entry:
                        raise InputError(f"{ROWS}: {kind}.{key}: the key {needed!r} is missing")
            self._entries[kind] = sorted(entries.values(), key=lambda entry: entry["seed"])

    @classmethod
    def read(cls) -> Records:
        """Those of the project in the working folder."""
        return cls(read_yaml(ROWS))

    @property
    def scales(self) -> list[str]:
        """In the order of their first entries."""
        entries = (entry for entries in self._entries.values() for entry in entries)
        return list(dict.fromkeys(entry["scale"] for entry in entries))

    def systems(self, kind: str) -> list[str]:
        return list(dict.fromkeys(entry["system"] for entry in self._entries.get(kind, [])))

    def of(self, kind: str, system: str, scale: str) -> list[Record]:
        """The system's runs at a scale, one a declared seed, by seed."""
        return [
            Record(entry["seed"], self._folder(kind, entry), self._files(kind, entry))
            for entry in self._entries.get(kind, [])
            if (entry["system"], entry["scale"]) == (system, scale)
        ]

    def _folder(self, kind: str, entry: Mapping[str, Any]) -> Path:
        return self._root / entry["scale"] / kind / entry["name"]

    def _files(self, kind: str, entry: Mapping[str, Any]) -> dict[str, Path]:
        if kind not in TESTED:
            return {}
        row = self._named("rows", entry, "row") or entry
        search = self._named("searches", row, "search")
        dataset = self._named("datasets", search or row, "dataset")
        files = {}
        if search:
            files["search"] = self._folder("searches", search) / "search.cost.json"
        if dataset:
            files["data"] = self._folder("datasets", dataset) / "data.json"
        folder = self._folder(kind, entry)
        return files | {what: folder / name for what, name in TESTED[kind].items()}

    def _named(self, kind: str, entry: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
        """The entry that another one of the same scale refers to, empty if there is none."""
        wanted = (entry.get(reference), entry["scale"])
        entries = self._entries.get(kind, [])
        return next((e for e in entries if (e["name"], e["scale"]) == wanted), {})
