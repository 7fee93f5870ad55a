"""Training by labels, self-supervised pre-training, and predictions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ssnas import finetune
from ssnas.config.schema import Finetune, Search, Views
from ssnas.data import Dataset
from ssnas.data.views import Normalise
from ssnas.errors import InputError
from ssnas.finetune import epoch_seconds, evaluate, fit, latency_ms, mixing_sweep, predict, pretrain
from ssnas.networks.bilateral import BilateralSupernet
from ssnas.networks.derived import DerivedNetwork
from ssnas.networks.operations import RELAXATIONS
from ssnas.training import trainer
from ssnas.training.checkpoint import Checkpoint
from ssnas.training.images import TrainingData
from ssnas.training.optimizer import Descent

CPU = torch.device("cpu")
CONFIG = Finetune(epochs=2, batch_size=8, loss="ce", learning_rate=0.05)


@pytest.fixture
def train(genotype):
    """Fit a tiny network to splits: the network, the result, and the normalisation."""

    def run(splits, config=CONFIG, seed=0, checkpoint=None):
        torch.manual_seed(seed)
        network = DerivedNetwork(genotype, 2, 3, splits.train.num_classes, 3, 1)
        data = TrainingData.of(splits)
        result = fit(network, data, config, seed, CPU, checkpoint=checkpoint)
        return network, result, data.normalise

    return run


def history(result):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in result.history]


def equal(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


# Training


@pytest.mark.parametrize("loss", ["ce", "focal+la", "balanced-sigmoid"])
def test_training_learns_an_easy_task(splits, train, loss):
    network, result, normalise = train(splits, replace(CONFIG, loss=loss, epochs=12))
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.8 * losses[0]
    assert evaluate(network, splits.test, normalise, CPU)["balanced_accuracy"] > 0.6
    assert result.epoch == len(result.history) == 12
    assert {"val_accuracy", "val_balanced_accuracy", "learning_rate"} < set(result.history[0])


def test_multi_label_training(multi_label, train):
    config = replace(CONFIG, loss="focal+la", epochs=12)
    network, result, normalise = train(multi_label, config)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert evaluate(network, multi_label.test, normalise, CPU)["macro_auc"] > 0.7
    assert {"val_binary_accuracy", "val_macro_auc"} < set(result.history[0])


def test_a_single_label_loss_on_multi_label_data(multi_label, train):
    with pytest.raises(InputError, match="ldam-drw"):
        train(multi_label, replace(CONFIG, loss="ldam-drw"))


def test_the_seed_decides(splits, train):
    config = replace(CONFIG, epochs=1)
    one, again, other = (train(splits, config, seed) for seed in (0, 0, 1))
    assert equal(one[0], again[0])
    assert history(one[1]) == history(again[1])
    assert not equal(one[0], other[0])


CYCLE = {"optimiser": "adamw", "schedule": "one-cycle", "averaging": 0.9}


@pytest.mark.parametrize("changes", [{}, {"early_stop": 5}, CYCLE])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, splits, train, changes):
    config = replace(CONFIG, loss="focal+la", **changes)
    whole = train(splits, config)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    step, calls = Descent.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(Descent, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path, {}) as checkpoint:
        train(splits, config, checkpoint=checkpoint)
    with Checkpoint(tmp_path, {}) as checkpoint:
        resumed = train(splits, config, checkpoint=checkpoint)
    assert len(calls) == 2 * 4 + 1
    assert equal(resumed[0], whole[0])
    assert history(resumed[1]) == history(whole[1])
    assert resumed[1].epoch == whole[1].epoch


@pytest.mark.parametrize("figures", [[0.5, 0.9, 0.7, 0.9, 0.8, 1.0], [0.9, 0.1, 0.2, 0.3, 0.4]])
def test_early_stopping_keeps_the_best_weights(splits, train, monkeypatch, figures):
    script, seen = iter(figures), []

    def scripted(network, *_):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return {"accuracy": 0.0, "balanced_accuracy": next(script)}

    monkeypatch.setattr(finetune, "evaluate", scripted)
    network, result, _ = train(splits, replace(CONFIG, epochs=6, early_stop=3, batch_size=32))
    best = figures.index(max(figures[:5]))
    assert result.epoch == best + 1
    assert len(result.history) == len(seen) == best + 1 + 3
    assert all(value.equal(seen[best][key]) for key, value in network.state_dict().items())
    assert not all(v.equal(seen[-1][k]) for k, v in network.state_dict().items())


def test_without_early_stopping_the_last_epoch_stays(splits, train, monkeypatch):
    script, seen = iter([1.0, 0.5, 0.0]), []

    def scripted(network, *_):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return {"accuracy": 0.0, "balanced_accuracy": next(script)}

    monkeypatch.setattr(finetune, "evaluate", scripted)
    network, result, _ = train(splits, replace(CONFIG, epochs=3, batch_size=32))
    assert (result.epoch, len(result.history)) == (3, 3)
    assert all(value.equal(seen[-1][key]) for key, value in network.state_dict().items())


def test_a_batch_is_at_most_all_images(splits, train):
    _, result, _ = train(splits, replace(CONFIG, epochs=1, batch_size=1000))
    assert np.isfinite(result.history[0]["loss"])


def test_diverging_training_is_told_and_keeps_finite_weights(tmp_path, monkeypatch, splits, train):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    with Checkpoint(tmp_path, {}) as checkpoint:
        with pytest.raises(InputError, match=r"finetune: loss became \w+ at epoch \d+, step \d+"):
            config = replace(CONFIG, learning_rate=1e30, epochs=9)
            train(splits, config, checkpoint=checkpoint)
        weights = checkpoint.load()["parts"]["network"]
    assert all(value.isfinite().all() for value in weights.values())


# Prediction


def test_probabilities_do_not_depend_on_the_batch(splits, multi_label, train, monkeypatch):
    for data in (splits, multi_label):
        network, _, normalise = train(data, replace(CONFIG, epochs=1))
        before = {key: value.clone() for key, value in network.state_dict().items()}
        whole = predict(network, data.test, normalise, CPU)
        monkeypatch.setattr(finetune, "EVALUATION_BATCH", 5)
        np.testing.assert_allclose(
            predict(network, data.test, normalise, CPU), whole, rtol=0, atol=1e-6
        )
        monkeypatch.undo()
        assert whole.shape == (18, data.train.num_classes)
        assert whole.min() >= 0
        assert whole.max() <= 1
        if data is splits:
            np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
        assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_predictions_are_not_logit_adjusted(splits, train):
    network, _, normalise = train(splits, replace(CONFIG, loss="ce+la", tau=10.0, epochs=1))
    network.eval()
    with torch.no_grad():
        logits = network(normalise(torch.from_numpy(splits.test.images)))
    expected = logits.softmax(dim=1).numpy()
    np.testing.assert_allclose(
        predict(network, splits.test, normalise, CPU), expected, rtol=0, atol=1e-6
    )


def test_latency_is_of_one_image(splits, train, monkeypatch):
    network, _, normalise = train(splits, replace(CONFIG, epochs=1))
    ticks = iter([0, 9, 10, 11, 20, 23, 30, 32, 40, 47])
    monkeypatch.setattr(finetune.time, "perf_counter", lambda: next(ticks))
    # Five passes of 9, 1, 3, 2 and 7 s over 18 images: their median is 3 s.
    assert latency_ms(network, splits.test, normalise, CPU) == pytest.approx(3000 / 18)


# Pre-training


def test_pretraining_moves_the_features_and_reads_no_label(splits, genotype):
    def pretrained(data):
        torch.manual_seed(0)
        network = DerivedNetwork(genotype, 2, 3, 3, 3, 1)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        config = replace(CONFIG, pretrain_epochs=2)
        search = Search(objective="nt-xent", projector=4)
        shown = TrainingData(data, data, Normalise.of(data.images), True)
        seconds = pretrain(network, shown, config, search, Views(), 0, CPU)
        assert seconds > 0
        return before, network.state_dict()

    train = splits.train
    before, after = pretrained(train)
    moved = {key for key in before if not before[key].equal(after[key])}
    assert {"stem.0.weight", "stem.1.running_mean"} < moved
    assert not any(key.startswith("classifier.") for key in moved)
    other = Dataset(train.images, 2 - train.labels, train.class_names)
    assert all(value.equal(after[key]) for key, value in pretrained(other)[1].items())


def test_supervised_search_has_nothing_to_pretrain_with(splits, genotype):
    network, data = DerivedNetwork(genotype, 2, 3, 3, 3, 1), TrainingData.of(splits)
    config, search = replace(CONFIG, pretrain_epochs=1), Search(objective="supervised")
    with pytest.raises(InputError, match=r"finetune\.pretrain_epochs.*nt-xent"):
        pretrain(network, data, config, search, Views(), 0, CPU)


# Supernets, trained on and tested themselves


@pytest.fixture
def bilateral(monkeypatch):
    monkeypatch.setitem(RELAXATIONS, "softmax", ("none", "skip_connect", "dil_conv_3x3"))
    torch.manual_seed(0)
    return BilateralSupernet(2, 3, 3, "softmax", 1, 3)


def keep_training(network, splits, **changes):
    config = replace(CONFIG, sampling="bilateral", **changes)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fit(network, TrainingData.of(splits), config, 0, CPU)
    after = network.state_dict()
    return {key.split(".")[0] for key in before if not before[key].equal(after[key])}


def test_continued_training_leaves_alpha(bilateral, splits):
    moved = keep_training(bilateral, splits, mixing="constant")
    assert moved == {"stem", "cells", "branches", "classifiers"}


def test_a_frozen_backbone_stays_with_its_statistics(bilateral, splits):
    moved = keep_training(bilateral, splits, mixing="constant", freeze_backbone=True)
    assert moved == {"branches", "classifiers"}


def test_the_class_head_trains_alone(bilateral, splits):
    before = {k: v.clone() for k, v in bilateral.classifiers.state_dict().items()}
    keep_training(bilateral, splits, mixing="class-head")
    moved = {k for k, v in bilateral.classifiers.state_dict().items() if not v.equal(before[k])}
    assert moved == {"balanced.weight", "balanced.bias"}


def test_the_sweep_ends_at_the_branches(bilateral, splits):
    normalise = Normalise.of(splits.test.images)
    sweep = mixing_sweep(bilateral, splits.test, normalise, CPU)
    assert [point["ratio"] for point in sweep] == [step / 10 for step in range(11)]
    bilateral.eval()
    with torch.no_grad():
        x = normalise(torch.from_numpy(splits.test.images))
        for point, branch in ((sweep[0], "balanced"), (sweep[-1], "instance")):
            predicted = bilateral.branch(x, branch).argmax(dim=1).numpy()
            assert point["accuracy"] == pytest.approx((predicted == splits.test.labels).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "bilateral"}, r"finetune\.sampling"),
        ({"freeze_backbone": True}, r"finetune\.freeze_backbone"),
    ],
)
def test_bilateral_options_need_a_bilateral_network(splits, train, changes, message):
    with pytest.raises(InputError, match=message):
        train(splits, replace(CONFIG, **changes))


def test_training_by_class_balanced_batches(splits, train):
    """Batches of equal classes: the rare class is learnt although the loss ignores its rarity."""
    network, _, normalise = train(splits, replace(CONFIG, sampling="balanced", epochs=12))
    assert evaluate(network, splits.test, normalise, CPU)["balanced_accuracy"] > 0.6


def test_averaged_weights_are_the_mean_of_the_last_steps(splits, train, monkeypatch):
    """Of a linear classifier, which has no batch norm."""
    seen, step = [], Descent.step

    def recorded(descent, loss):
        step(descent, loss)
        seen.append([p.detach().clone() for p in descent.parameters])

    monkeypatch.setattr(Descent, "step", recorded)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    config = Finetune(epochs=5, batch_size=8, averaging=0.4)
    fit(network, TrainingData.of(splits), config, seed=0, device=torch.device("cpu"))
    last = seen[-8:]  # of 20 steps
    for parameter, values in zip(network.parameters(), zip(*last, strict=True), strict=True):
        torch.testing.assert_close(parameter.detach(), torch.stack(values).mean(dim=0))


def test_batch_norms_follow_the_averaged_weights(splits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    norm = network[2]
    norm.momentum = 1.0  # only the last batch counts, whose mean is then known
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    config = Finetune(epochs=2, batch_size=8, averaging=0.5)
    fit(network, TrainingData.of(splits), config, seed=0, device=torch.device("cpu"))
    torch.testing.assert_close(norm.running_mean, seen[-1].mean(dim=0))
    assert len(seen[-1]) == 8


def test_measuring_an_epoch_changes_nothing(splits, genotype):
    torch.manual_seed(0)
    network = DerivedNetwork(genotype, 2, 3, 3, 3, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = Finetune(epochs=1, batch_size=8)
    seconds = epoch_seconds(network, TrainingData.of(splits), config, torch.device("cpu"))
    assert seconds > 0
    after = network.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
