"""The files that stages leave for one another."""

import csv
import json
from pathlib import Path

import pytest
import torch

from ssnas.errors import InputError
from ssnas.networks.genotype import Genotype
from ssnas.networks.supernet import Supernet
from ssnas.pipeline.artifacts import (
    Places,
    load_weights,
    save_weights,
    write_csv,
    write_json,
)


def test_weights_round_trip(tmp_path):
    torch.manual_seed(0)
    supernet = Supernet(2, 3, 1, "sigmoid", 1).to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "supernet.safetensors"
    save_weights(path, supernet.state_dict())
    loaded = load_weights(path)
    state = supernet.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[key].equal(state[key]) for key in state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = tmp_path / "again.safetensors"
    save_weights(again, supernet.state_dict())
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-3], lambda b: b"x" * len(b)])
def test_damaged_weights(tmp_path, damage):
    path = tmp_path / "network.safetensors"
    save_weights(path, {"w": torch.zeros(2)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"network\.safetensors: damaged"):
        load_weights(path)


@pytest.mark.parametrize("read", [Genotype.read, load_weights])
def test_missing_files(tmp_path, read):
    with pytest.raises(InputError, match="nothing: not found; `dvc repro`"):
        read(tmp_path / "nothing")


def test_genotype_file(tmp_path, genotype):
    (tmp_path / "genotype.json").write_text(genotype.to_json(), encoding="utf-8")
    assert Genotype.read(tmp_path / "genotype.json") == genotype
    (tmp_path / "genotype.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="genotype"):
        Genotype.read(tmp_path / "genotype.json")


def test_tables_and_documents(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 0.1, "name": "é"})
    assert json.loads((tmp_path / "new" / "a.json").read_text("utf-8")) == {"b": 0.1, "name": "é"}
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "knn, k": 0.5}])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "1", "loss": "0.1", "knn, k": ""},
        {"epoch": "2", "loss": "", "knn, k": "0.5"},
    ]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    real = Path.write_text

    def half(self, text, **options):
        real(self, text[: len(text) // 2], **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    for write in (lambda: write_json(path, {"b": 2}), lambda: write_csv(path, [{"b": 2}])):
        with pytest.raises(InputError, match=r"a\.json: cannot be written \(No space left"):
            write()
        assert json.loads(path.read_text("utf-8")) == {"a": 1}


def test_places():
    places = Places({"datasets": "main", "searches": "s", "rows": "r"})
    assert places.splits == Path("data/main/splits.npz")
    assert places.supernet == Path("artifacts/s/search/supernet.safetensors")
    assert places.network == Path("artifacts/r/finetune/network.safetensors")
    assert places.metrics("rows", "evaluate.json") == Path("metrics/r/evaluate.json")
    assert places.checkpoint("searches", "search-0") == Path(".checkpoints/s/search-0")
