"""Folds of other data sets, and training on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssnas.config.schema import Finetune
from ssnas.data import Dataset, Source, folds_of
from ssnas.errors import InputError
from ssnas.networks.derived import DerivedNetwork, inherit
from ssnas.pipeline import transfer
from ssnas.training import objectives
from ssnas.training.checkpoint import Checkpoint

CPU = torch.device("cpu")
CONFIG = Finetune(epochs=2, batch_size=8, loss="ce", learning_rate=0.05)


def test_folds_test_every_image_once(splits):
    numbered = splits.train.images.copy()
    numbered[:, 0, 0, 0] = np.arange(len(numbered))
    pool = Dataset(numbered, splits.train.labels, splits.train.class_names)
    folds = folds_of(Source(pool, None, None, {}, True), 4, 0.2, seed=0)
    assert len(folds) == 4
    for fold in folds:
        numbers = [set(d.images[:, 0, 0, 0]) for d in (fold.train, fold.val, fold.test)]
        assert sorted(n for some in numbers for n in some) == list(range(len(pool)))
        assert all(min(d.counts) >= 1 for d in (fold.train, fold.val, fold.test))
        assert fold.flip
    tested = [n for fold in folds for n in fold.test.images[:, 0, 0, 0]]
    assert sorted(tested) == list(range(len(pool)))


def test_a_published_split_is_kept(splits):
    source = Source(splits.train, splits.val, splits.test, {}, False)
    (fold,) = folds_of(source, 4, 0.2, seed=0)
    for name in ("train", "val", "test"):
        kept, published = getattr(fold, name), getattr(splits, name)
        assert np.array_equal(kept.images, published.images)
        assert np.array_equal(kept.labels, published.labels)
    assert not fold.flip


def test_a_published_test_set_without_validation_images(splits):
    (fold,) = folds_of(Source(splits.train, None, splits.test, {}, True), 4, 0.2, seed=0)
    assert np.array_equal(fold.test.images, splits.test.images)
    assert len(fold.train) + len(fold.val) == len(splits.train)


def test_too_many_folds(splits):
    with pytest.raises(InputError, match="'light' of 4 images"):
        folds_of(Source(splits.train, None, None, {}, True), 5, 0.2, seed=0)


def test_train_and_test_goes_on_where_it_was(tmp_path, splits, genotype, monkeypatch):
    def build(weights=None):
        network = DerivedNetwork(genotype, 2, 3, 3, 3, 1)
        if weights is not None:
            inherit(network, weights)
        return network

    def run(weights=None, folder="a"):
        config = replace(CONFIG, epochs=1)
        with Checkpoint(tmp_path / folder, {}) as checkpoint:
            return transfer.train_and_test(
                lambda: build(weights), splits, config, 0, CPU, "fold", checkpoint
            )

    first = run()
    assert {"accuracy", "balanced_accuracy", "macro_auc"} <= set(first.figures)
    assert set(first.decisions) == {"published", "balanced", "natural"}
    assert first.seconds > 0
    weights = build().state_dict()
    inherited = run(weights, "b").figures
    assert inherited == run(weights, "c").figures

    def trained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(objectives, "crop_and_flip", trained)
    again = run()
    assert (again.figures, again.decisions, again.seconds) == (
        first.figures,
        first.decisions,
        first.seconds,
    )
