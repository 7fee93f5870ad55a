"""The places of a run's files, and how weights, figures and text are written."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from ssnas.config.schema import Run
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


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with written_whole(path) as partial:
        partial.write_bytes(save(tensors))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the weights in a file.

    Raises:
        InputError: if the file is missing or damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "w.safetensors")
        ...     save_weights(path, {"w": torch.ones(2)})
        ...     load_weights(path)["w"]
        tensor([1., 1.])
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; `dvc repro` makes it") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run `dvc repro`") from error


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
