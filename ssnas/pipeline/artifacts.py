"""Files that stages leave for one another: weights that carry their configuration, and text."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ssnas.config.schema import Run
from ssnas.data.splits import read
from ssnas.data.types import Splits
from ssnas.errors import InputError
from ssnas.runtime.files import written_whole

RAW = Path("data/raw")
"""The folder of downloaded images."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of a run's files.

    The papers' rows are a DVC project of their own: folders that begin with `papers/` keep all
    that their stages write below papers/.

    Args:
        folders: the folder's name by kind of entry, see `ssnas.config.schema.Run`.
        root: the folder that all of them are in.

    Example:
        >>> Places({"datasets": "main"}).splits.as_posix()
        'data/main/splits.npz'
        >>> Places({"rows": "papers/small/rows/ce"}).metrics("rows", "evaluate.json").as_posix()
        'papers/metrics/small/rows/ce/evaluate.json'
        >>> Places({"rows": "."}, Path("runs/mine")).network.as_posix()
        'runs/mine/artifacts/finetune/network.safetensors'
    """

    folders: Mapping[str, str]
    root: Path = Path()

    @classmethod
    def of(cls, run: Run) -> Places:
        return cls(run.folders, run.root)

    @property
    def splits(self) -> Path:
        return self._folder("data", "datasets") / "splits.npz"

    @property
    def supernet(self) -> Path:
        return self._folder("artifacts", "searches") / "search" / "supernet.safetensors"

    @property
    def network(self) -> Path:
        return self._folder("artifacts", "rows") / "finetune" / "network.safetensors"

    @property
    def model(self) -> Path:
        return self._folder("artifacts", "rows") / "export" / "model.ssnas"

    def metrics(self, kind: str, name: str) -> Path:
        """Return the place of the metrics file `name` of the run's entry of a kind."""
        return self._folder("metrics", kind) / name

    def checkpoint(self, kind: str, stage: str) -> Path:
        return self.root / ".checkpoints" / self.folders[kind] / stage

    def _folder(self, top: str, kind: str) -> Path:
        parts = Path(self.folders[kind]).parts
        if parts[:1] == ("papers",):
            return self.root.joinpath("papers", top, *parts[1:])
        return self.root.joinpath(top, *parts)


def search_description(run: Run) -> dict[str, Any]:
    """Describe what the searched weights depend on.

    The supernet's file carries it, and its readers compare.
    """
    return {
        "seed": run.seeds["searches"],
        "search": dataclasses.asdict(run.search),
        "views": dataclasses.asdict(run.views),
        "data": digest(Places.of(run).splits),
    }


def finetune_description(run: Run) -> dict[str, Any]:
    """Describe what the fine-tuned weights depend on.

    The network's file carries it, and its readers compare.
    """
    places = Places.of(run)
    description = {
        "seed": run.seeds["rows"],
        "finetune": dataclasses.asdict(run.finetune),
        "data": digest(places.splits),
    }
    if "searches" in run.folders:
        description["genotype"] = digest(places.metrics("searches", "genotype.json"))
        description["supernet"] = digest(places.supernet)
    return description


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: if the file is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "empty")
        ...     _ = path.write_bytes(b"")
        ...     digest(path)[:12]
        'e3b0c44298fc'
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; `dvc repro` makes it") from error


def read_splits(run: Run) -> Splits:
    """Read the run's training, validation and test images.

    Raises:
        InputError: if their file is missing or damaged.
    """
    return read(Places.of(run).splits)


def save_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a safetensors file that carries how its weights came about."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with written_whole(path) as partial:
        save_file(tensors, partial, {"description": json.dumps(description, sort_keys=True)})


def load_weights(path: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Load the weights in a file, if they came about as `expected` says.

    Raises:
        InputError: if the file is missing, damaged, or was made with other parameters or data.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "w.safetensors")
        ...     save_weights(path, {"w": torch.ones(2)}, {"seed": 0})
        ...     load_weights(path, {"seed": 0})["w"]
        tensor([1., 1.])
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            carried = json.loads((file.metadata() or {}).get("description", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; `dvc repro` makes it") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run `dvc repro`") from error
    wanted = json.loads(json.dumps(expected))
    different = [key for key in sorted({*wanted, *carried}) if wanted.get(key) != carried.get(key)]
    if different:
        raise InputError(
            f"{path}: made with another {', '.join(different)} than the parameters now say; run "
            "`dvc repro`, or `dvc checkout` to bring back the matching file"
        )
    return weights


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV whose columns are the keys, in the order of their first appearance.

    A missing value, None or not a number is an empty cell.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "epochs.csv")
        ...     write_csv(path, [{"epoch": 1}, {"epoch": 2, "loss": 0.5}])
        ...     path.read_text()
        'epoch,loss\\n1,\\n2,0.5\\n'
    """
    rows = [{key: "" if value != value else value for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
