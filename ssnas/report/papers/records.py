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

METRICS = Path("papers/metrics")

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

Entry = Mapping[str, Any]


def cross_validated(kind: str) -> bool:
    """Tell whether the test figures of a kind of entry are means over folds."""
    return TESTED[kind] is _CROSS_VALIDATED


@dataclass(frozen=True)
class Record:
    """The files that the run of one seed of a system wrote.

    Attributes:
        folder: the folder of the run.
        files: the files that a table reads, by what they tell; also those of the search and of
            the data set that the run is of.
    """

    seed: int
    folder: Path
    files: Mapping[str, Path]

    @property
    def has_run(self) -> bool:
        """True once the test figures are written."""
        return self.files["figures"].exists()

    def read(self, what: str) -> dict[str, Any]:
        """Read one of the files, as empty where it has not been written.

        Raises:
            InputError: if it is malformed.
        """
        path = self.files.get(what)
        return read_json(path) if path and path.exists() else {}

    def number(self, what: str, key: str) -> float | None:
        """Read a number in one of the files, None where there is none.

        A key `decision.figure` reads the figure of another decision than the file's own.

        Raises:
            InputError: if the file is malformed, or the value is not a finite number.
        """
        document: Any = self.read(what)
        decision, dot, figure = key.rpartition(".")
        if dot:
            document = (document.get("decisions") or {}).get(decision) or {}
        value = document.get(figure)
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
        self._entries: dict[str, list[Entry]] = {}
        for kind, entries in document.items():
            for name, entry in (entries or {}).items():
                for key in ("name", "system", "scale", "seed"):
                    if key not in entry:
                        raise InputError(f"{ROWS}: {kind}.{name}: the key {key!r} is missing")
            self._entries[kind] = sorted((entries or {}).values(), key=lambda entry: entry["seed"])

    @classmethod
    def read(cls) -> Records:
        """Read those of the project in the working folder."""
        return cls(read_yaml(ROWS))

    @property
    def scales(self) -> list[str]:
        """The scales in the order of their first entries."""
        entries = (entry for entries in self._entries.values() for entry in entries)
        return list(dict.fromkeys(entry["scale"] for entry in entries))

    def systems(self, kind: str) -> list[str]:
        """List the systems that have entries of a kind."""
        return list(dict.fromkeys(entry["system"] for entry in self._entries.get(kind, [])))

    def of(self, kind: str, system: str, scale: str) -> list[Record]:
        """List the system's runs at a scale, one a declared seed, by seed."""
        return [
            Record(entry["seed"], self._folder(kind, entry), self._files(kind, entry))
            for entry in self._entries.get(kind, [])
            if (entry["system"], entry["scale"]) == (system, scale)
        ]

    def _folder(self, kind: str, entry: Entry) -> Path:
        return self._root / entry["scale"] / kind / entry["name"]

    def _files(self, kind: str, entry: Entry) -> dict[str, Path]:
        row = self._referred("rows", entry, "row") or entry
        search = self._referred("searches", row, "search")
        dataset = self._referred("datasets", search or row, "dataset")
        files = {}
        if search:
            files["search"] = self._folder("searches", search) / "search.cost.json"
        if dataset:
            files["data"] = self._folder("datasets", dataset) / "data.json"
        folder = self._folder(kind, entry)
        return files | {what: folder / name for what, name in TESTED.get(kind, {}).items()}

    def _referred(self, kind: str, entry: Entry, key: str) -> Entry:
        """Look up the entry of the same scale that `entry` names by `key`; empty if none."""
        wanted = (entry.get(key), entry["scale"])
        entries = self._entries.get(kind, [])
        return next((e for e in entries if (e["name"], e["scale"]) == wanted), {})
