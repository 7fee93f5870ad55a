"""The page of the parameters: every key has a meaning, and the page says what the schema says."""

import dataclasses

import pytest

from docs.generate import PAGE, accepted, meanings, page
from ssnas.config.schema import SECTIONS, Data, Finetune, Search


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
            "Momentum of SGD",
            "0.9",
        )
    )


def test_accepted_values_read_as_in_a_sentence():
    fields = {field.name: field for field in dataclasses.fields(Data)}
    assert accepted(fields["size"], int | None) == "whole, ≥ 8, or null"
    assert accepted(fields["val_fraction"], float) == "number, > 0 and ≤ 0.5"
    assert accepted(fields["flip"], bool | None) == "true, false, or null"
    assert accepted(fields["bad_images"], str) == "`error`, `skip`"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m docs.generate`"
