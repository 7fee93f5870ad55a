"""The page of the parameters: every key has a meaning, and the page says what the schema says."""

import dataclasses
from pathlib import Path

import jsonschema
import pytest
import yaml

from docs.generate import accepted, json_schema, meanings, written
from ssnas.config.load import load_main
from ssnas.config.schema import SECTIONS, Data, Finetune, Search
from ssnas.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_every_key_has_a_meaning(section):
    texts = meanings(section)
    assert list(texts) == [field.name for field in dataclasses.fields(section)]
    assert all(meaning for meaning, _ in texts.values())


def test_a_section_may_say_anew_what_its_base_says():
    assert meanings(Search)["epochs"] != meanings(Finetune)["epochs"]
    assert (
        meanings(Search)["momentum"]
        == meanings(Finetune)["momentum"]
        == (
            "Momentum of SGD, or β₁ of AdamW",
            "0.9",
        )
    )


def test_accepted_values_read_as_in_a_sentence():
    fields = {field.name: field for field in dataclasses.fields(Data)}
    assert accepted(fields["size"], int | None) == "whole, ≥ 8 and ≤ 4,096, or null"
    assert accepted(fields["val_fraction"], float) == "number, > 0 and ≤ 0.5"
    assert accepted(fields["flip"], bool | None) == "true, false, or null"
    assert accepted(fields["bad_images"], str) == "`error`, `skip`"


def test_the_files_are_up_to_date():
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, "run `python -m docs.generate`"


def test_the_schema_accepts_the_parameters_of_the_project():
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(params, json_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 1},
        {"loss": "hinge"},
        {"search": {"cells": 2}},
        {"search": {"epoch": 3}},
        {"data": {"val_fraction": 0}},
        {"data": {"size": 10**6}},
        {"decide": {"cat": 2}},
        {"scales": {"small": {"views": {}}}},
        {"derive": {"rule": None}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(wrong, tmp_path):
    document = {"scales": {"small": {}}} | wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json_schema())
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError):
        load_main(path)
