"""Recipes: which keys win over which, and what follows from the number of images."""

from pathlib import Path

import pytest
import yaml

from ssnas.config.load import load_main, load_options, load_row
from ssnas.config.recipes import (
    RECIPES,
    SEARCH_LENGTH,
    TRAINING_LENGTH,
    alpha_and_omega,
    shaped,
    sized,
    within,
)
from ssnas.config.schema import SECTIONS, Finetune, Search, build
from ssnas.errors import InputError

SCALES = {"small": {"finetune": {"epochs": 40, "batch_size": 64}, "search": {"channels": 6}}}


@pytest.fixture
def main(tmp_path):
    def load(**document):
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump({"scales": SCALES, **document}), "utf-8")
        return load_main(path)

    return load


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_accepted_by_its_sections(name):
    for section, keys in RECIPES[name].items():
        build(SECTIONS[section], name, keys)


def test_the_published_recipe_is_what_stands_without_one(main):
    assert main(recipe="published") == main()
    assert main().finetune.optimiser == "sgd"
    assert main().finetune.loss == "focal+la"


def test_default_then_scale_then_recipe_then_run(main):
    short = RECIPES["short"]["finetune"]
    trained = main(recipe="short").finetune
    assert trained.learning_rate == short["learning_rate"]
    assert trained.epochs is None, "the recipe wins over the scale"
    assert main(recipe="short", finetune={"epochs": 7}).finetune.epochs == 7
    assert main(recipe="short", loss="ldam-drw").finetune.loss == "ldam-drw"
    assert main(recipe="short", loss=None).finetune.loss == short["loss"]
    assert main(recipe="short").search.channels in (6, RECIPES["short"]["search"].get("channels"))


def test_a_section_may_have_a_recipe_of_its_own(main):
    run = main(recipe="short", search={"recipe": "published"})
    assert run.search.optimiser == "sgd"
    assert run.views == main().views, "the views are the search's"
    assert run.finetune.optimiser == "adamw"
    assert run.finetune.recipe == "short"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"recipe": "long"}, ["recipe", "'long'", "published", "short"]),
        ({"finetune": {"recipe": 3}}, ["finetune.recipe", "3"]),
    ],
)
def test_an_unknown_recipe_is_named(main, document, words):
    with pytest.raises(InputError) as caught:
        main(**document)
    assert all(word in str(caught.value) for word in words)


def test_a_row_has_the_recipe_of_its_entry(tmp_path):
    rows, params = tmp_path / "rows.yaml", tmp_path / "params.yaml"
    entries = {
        "datasets": {"d": {"name": "d", "scale": "small"}},
        "searches": {"s": {"name": "s", "scale": "small", "dataset": "d", "recipe": "short"}},
        "rows": {"r": {"name": "r", "scale": "small", "search": "s", "loss": "ce"}},
    }
    rows.write_text(yaml.safe_dump(entries), "utf-8")
    params.write_text(yaml.safe_dump({"scales": SCALES}), "utf-8")
    run = load_row("rows", "r", rows, params)
    assert (run.search.optimiser, run.finetune.optimiser) == ("adamw", "sgd")
    assert run.views.min_area == RECIPES["short"]["views"]["min_area"]
    assert (run.finetune.epochs, run.finetune.loss) == (40, "ce")


def test_a_search_by_its_name():
    fixed = load_options({"dataset": "digits", "search": "none"}, None, Path())
    assert (fixed.search.epochs, fixed.derive.rule, fixed.finetune.inherit) == (0, "fixed", False)
    by_labels = load_options({"dataset": "digits", "search": "supervised"}, None, Path())
    assert by_labels.search.objective == "supervised"
    with pytest.raises(InputError, match=r"search.*'magic'.*none, barlow-twins"):
        load_options({"dataset": "digits", "search": "magic"}, None, Path())
    kept = load_options({"search": "none", "derive": {"op": "skip_connect"}}, None, Path())
    assert (kept.derive.rule, kept.derive.op) == ("fixed", "skip_connect")


def test_more_images_are_fewer_epochs_in_larger_batches():
    by_number = Finetune(epochs=None, batch_size=None)
    sizes = [sized(by_number, images) for images in (2, 60, 400, 1500, 8000, 10**6)]
    epochs, batches = [s.epochs for s in sizes], [s.batch_size for s in sizes]
    assert epochs == sorted(epochs, reverse=True)
    assert batches == sorted(batches)
    assert (epochs[0], epochs[-1]) == (TRAINING_LENGTH.most, TRAINING_LENGTH.fewest)
    assert batches[0] == 2, "never more than there are images"
    assert sized(by_number, 1).batch_size == 2


def test_a_search_counts_the_images_of_omega():
    by_number = Search(epochs=None, batch_size=None, omega_share=0.8)
    assert sized(by_number, 1000).epochs == SEARCH_LENGTH.images // 800
    assert sized(by_number, 20).batch_size == alpha_and_omega(20, 0.8)[0] == 4


def test_a_shape_that_is_set_stays():
    assert shaped(Search(channels=5, stem="imagenet"), 10**6, 8) == Search(
        channels=5, stem="imagenet"
    )
    few, many = (shaped(Search(channels=None, stem=None), n, 32) for n in (999, 1000))
    assert (few.stem, many.stem) == ("half", "quarter")
    assert few.channels < many.channels


def test_there_is_always_time_for_one_epoch():
    assert within(Finetune(), seconds=-3, epoch_seconds=2).epochs == 1
