"""Systems: each becomes one entry for every scale and seed."""

from pathlib import Path

import pytest

from ssnas.config.load import read_yaml
from ssnas.config.systems import expand
from ssnas.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ROWS, PARAMS = ROOT / "papers" / "rows.yaml", ROOT / "params.yaml"
SYSTEMS = ROOT / "papers" / "systems.yaml"


def test_own_rows_are_those_of_the_systems():
    scales = list(read_yaml(PARAMS)["scales"])
    expanded = expand(read_yaml(SYSTEMS), scales, SYSTEMS)
    assert read_yaml(ROWS) == expanded, "run `python -m stages.rows`"


def test_each_scale_and_seed_is_an_entry():
    systems = {
        "datasets": {"d": {"dataset": "digits", "small": {"largest_class": 9}}},
        "searches": {"s": {"dataset": "d", "seeds": 2, "paper": {"epochs": 5}}},
        "rows": {"r": {"search": "s", "seeds": 3, "paper": {"seeds": 2}}},
    }
    entries = expand(systems, ["small", "paper"])
    assert list(entries["datasets"]) == ["small-d", "paper-d"]
    assert entries["datasets"]["small-d"]["largest_class"] == 9
    assert "largest_class" not in entries["datasets"]["paper-d"]
    assert list(entries["searches"]) == ["small-s", "small-s-seed1", "paper-s"]
    assert entries["searches"]["paper-s"] == {
        "name": "s", "system": "s", "scale": "paper", "seed": 0, "dataset": "d", "epochs": 5
    }  # fmt: skip
    rows = entries["rows"]
    assert {key: entry["search"] for key, entry in rows.items()} == {
        "small-r": "s",
        "small-r-seed1": "s-seed1",
        "small-r-seed2": "s",
        "paper-r": "s",
        "paper-r-seed1": "s",
    }
    assert [entry["seed"] for entry in rows.values()] == [0, 1, 2, 0, 1]
    assert {entry["system"] for entry in rows.values()} == {"r"}


@pytest.mark.parametrize(
    ("systems", "words"),
    [
        ({"row": {}}, ["row", "rows"]),
        ({"searches": {"s": {}}, "rows": {"r": {"search": "z"}}}, ["rows.r.search", "'z'", "s"]),
    ],
)
def test_mistakes_in_systems_are_named(systems, words):
    if "searches" in systems:
        systems = {"datasets": {"d": {}}, **systems, "searches": {"s": {"dataset": "d"}}}
    with pytest.raises(InputError) as caught:
        expand(systems, ["small"])
    assert [word for word in words if word not in str(caught.value)] == []
