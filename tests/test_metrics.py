"""Figures against scikit-learn and hand-computed values."""

import math

import numpy as np
import pytest
import sklearn.metrics as peer
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssnas import metrics
from ssnas.errors import InputError


def softmax_outputs(n, classes, seed=0):
    """Probabilities that know something about their skewed targets."""
    rng = np.random.default_rng(seed)
    skew = np.arange(classes, 0, -1) ** 2.0
    targets = rng.choice(classes, size=n, p=skew / skew.sum())
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[targets]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), targets


def test_single_label_agrees_with_sklearn():
    probabilities, targets = softmax_outputs(300, 5)
    assert set(targets) == set(range(5))
    predictions = probabilities.argmax(axis=1)
    figures = metrics.single_label(probabilities, targets)
    expected = {
        "accuracy": peer.accuracy_score(targets, predictions),
        "error_rate": peer.zero_one_loss(targets, predictions),
        "balanced_accuracy": peer.balanced_accuracy_score(targets, predictions),
        "macro_f1": peer.f1_score(targets, predictions, average="macro"),
        "macro_auc": peer.roc_auc_score(targets, probabilities, multi_class="ovr"),
        "log_loss": peer.log_loss(targets, probabilities),
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert set(figures) == {*expected, "expected_calibration_error"}
    assert all(type(value) is float for value in figures.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_single_label_takes_tensors(dtype):
    probabilities, targets = softmax_outputs(60, 3)
    tensor = torch.tensor(probabilities, dtype=dtype, requires_grad=True)
    expected = metrics.single_label(tensor.detach().double().numpy(), targets)
    assert metrics.single_label(tensor, torch.tensor(targets)) == pytest.approx(expected)


def test_absent_classes_are_left_out():
    # Class 2 has no test image, though one is taken for it.
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1]])
    targets = np.array([0, 0, 1, 1])
    figures = metrics.single_label(probabilities, targets)
    assert figures["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    # Class 0 against 0.2 and 0.1: its 0.7 beats both, its 0.1 loses one and ties one.
    assert figures["macro_auc"] == pytest.approx(((2 + 0.5) / 4 + 1) / 2)
    recall = metrics.per_class_recall(probabilities, targets)
    assert recall[:2] == [0.5, 1.0] and math.isnan(recall[2])


def test_one_class_has_no_auc_and_no_nan():
    figures = metrics.single_label([[0.7, 0.3], [0.4, 0.6]], [0, 0])
    assert "macro_auc" not in figures
    assert figures["balanced_accuracy"] == 0.5
    assert not any(math.isnan(value) for value in figures.values())


def test_expected_calibration_error_by_hand():
    # Bins of width 1/15: (0.60, 0.667] holds 0.62 right and 0.66 wrong, (0.667, 0.73] 0.68 right.
    confidences, right = [0.62, 0.66, 0.68], [True, False, True]
    probabilities = [[c, 1 - c] for c in confidences]
    targets = [0 if hit else 1 for hit in right]
    expected = 2 / 3 * abs(0.5 - 0.64) + 1 / 3 * abs(1 - 0.68)
    figures = metrics.single_label(probabilities, targets)
    assert figures["expected_calibration_error"] == pytest.approx(expected)


@pytest.mark.parametrize(("targets", "error"), [([0, 1], 0.0), ([1, 0], 1.0)])
def test_certain_predictions_calibrate_fully_or_not_at_all(targets, error):
    figures = metrics.single_label(np.eye(2), targets)
    assert figures["expected_calibration_error"] == error


@pytest.mark.parametrize(
    ("class_counts", "expected"),
    [
        ([101, 100, 20, 19], {"many_shot": 0.5, "medium_shot": 0.75, "few_shot": 0.0}),
        ([900, 800, 700, 600], {"many_shot": 0.5}),
        ([101, 200, 5, 5], {"many_shot": 0.75, "few_shot": 0.25}),
    ],
)
def test_shot_accuracies_by_hand(class_counts, expected):
    # Recalls 1/2, 1, 1/2, 0; class 3 has more images, which a mean of recalls does not see.
    targets = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 3])
    predictions = np.array([0, 1, 1, 1, 2, 0, 0, 0, 1, 2])
    figures = metrics.single_label(np.eye(4)[predictions], targets, class_counts)
    assert {key: value for key, value in figures.items() if "shot" in key} == expected


def test_confusion_by_hand():
    probabilities = np.eye(3)[[0, 1, 1, 0]]
    counts = metrics.confusion(probabilities, [0, 0, 1, 1])
    assert counts.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert np.issubdtype(counts.dtype, np.integer)


def test_multi_label_agrees_with_sklearn():
    rng = np.random.default_rng(0)
    targets = rng.random((200, 4)) < [0.5, 0.3, 0.1, 0.05]
    probabilities = np.clip(0.3 * targets + 0.7 * rng.random((200, 4)), 0, 1)
    thresholds = np.array([0.5, 0.4, 0.3, 0.2])
    figures = metrics.multi_label(probabilities, targets.astype(np.uint8), thresholds)
    given = probabilities > thresholds
    both = np.stack([1 - probabilities, probabilities], axis=2).reshape(-1, 2)
    accuracy = peer.accuracy_score(targets.ravel(), given.ravel())
    expected = {
        "binary_accuracy": accuracy,
        "error_rate": 1 - accuracy,
        "balanced_accuracy": np.mean(
            [peer.balanced_accuracy_score(*pair) for pair in zip(targets.T, given.T, strict=True)]
        ),
        "macro_f1": peer.f1_score(targets, given, average="macro"),
        "macro_auc": peer.roc_auc_score(targets, probabilities, average="macro"),
        "macro_average_precision": peer.average_precision_score(targets, probabilities),
        # Each label is a problem of two classes.
        "expected_calibration_error": metrics.single_label(both, targets.ravel().astype(int))[
            "expected_calibration_error"
        ],
        "log_loss": peer.log_loss(targets.ravel(), probabilities.ravel()),
    }
    assert figures == pytest.approx(expected)
    assert all(type(value) is float for value in figures.values())
    halves = metrics.multi_label(probabilities, targets.astype(np.uint8))
    assert halves["binary_accuracy"] == (targets == (probabilities > 0.5)).mean()


def test_a_sure_mistake_has_a_finite_log_loss():
    assert metrics.single_label([[1.0, 0.0]], [1])["log_loss"] == pytest.approx(15 * np.log(10))


def test_multi_label_leaves_out_labels_without_both_classes():
    probabilities = np.array([[0.9, 0.2, 0.6], [0.8, 0.3, 0.4], [0.1, 0.4, 0.9]])
    targets = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1]])
    aucs = metrics.per_label_auc(probabilities, targets)
    assert aucs[0] == 1.0 and math.isnan(aucs[1]) and math.isnan(aucs[2])
    figures = metrics.multi_label(probabilities, targets)
    # Label 0 is given to image 1 too, so that it is right for one of its two negatives.
    expected = {"binary_accuracy": 7 / 9, "balanced_accuracy": 3 / 4, "macro_f1": 2 / 3}
    expected |= {"macro_auc": 1.0, "macro_average_precision": 1.0}
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    without = metrics.multi_label(probabilities, np.zeros((3, 3)))
    assert not any(key.startswith(("macro", "balanced")) for key in without)
    assert not any(math.isnan(value) for value in without.values())


def test_no_finding_scores_well_without_any_skill():
    # 14 labels with 53 positives in 1000: 94.7% of the entries are zero.
    rng = np.random.default_rng(0)
    targets = np.zeros((1000, 14), dtype=np.uint8)
    for label in range(14):
        targets[rng.choice(1000, size=53, replace=False), label] = 1
    figures = metrics.constant_predictor(targets, targets)
    expected = {"binary_accuracy": 0.947, "balanced_accuracy": 0.5, "macro_f1": 0.0}
    expected |= {"macro_auc": 0.5, "macro_average_precision": 0.053}
    expected |= {"log_loss": -0.053 * math.log(0.053) - 0.947 * math.log(0.947)}
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    priors = metrics.constant_predictor(np.full(14, 0.053), targets)
    assert priors == pytest.approx(figures)


@pytest.mark.parametrize(
    "train", [np.array([1] * 6 + [0] * 3 + [2]), torch.tensor([0.3, 0.6, 0.1])]
)
def test_constant_predictor_takes_the_most_frequent_class(train):
    targets = np.array([0, 1, 1, 2, 2, 2, 2, 0])
    figures = metrics.constant_predictor(train, targets)
    assert figures["accuracy"] == pytest.approx(2 / 8)
    assert figures["balanced_accuracy"] == pytest.approx(1 / 3)
    assert figures["macro_auc"] == 0.5
    assert figures["expected_calibration_error"] == pytest.approx(0.6 - 2 / 8)


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (np.empty((0, 2)), np.empty(0, dtype=int), "no images"),
        (np.array([[0.5, np.nan]]), np.array([0]), "NaN"),
    ],
)
def test_figures_refuse_what_has_none(probabilities, targets, message):
    with pytest.raises(InputError, match=message):
        metrics.single_label(probabilities, targets)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_knn_agrees_with_sklearn(k, monkeypatch):
    monkeypatch.setattr(metrics, "_KNN_CHUNK", 16)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))
    labels = rng.integers(3, size=190)
    scale = rng.uniform(0.1, 10, size=(190, 1))
    features = scale * (centres[labels] + 1.5 * rng.normal(size=(190, 6)))
    classifier = KNeighborsClassifier(k, metric="cosine").fit(features[:150], labels[:150])
    expected = classifier.score(features[150:], labels[150:])
    assert 0.4 < expected < 1
    x, y = torch.tensor(features), torch.tensor(labels)
    assert metrics.knn_accuracy(x[:150], y[:150], x[150:], y[150:], k=k) == pytest.approx(expected)


def test_knn_with_fewer_images_than_neighbours_lets_all_vote():
    x, y = torch.eye(3), torch.tensor([1, 1, 0])
    assert metrics.knn_accuracy(x, y, x, y) == pytest.approx(2 / 3)


def test_mean_std_by_hand():
    runs = [{"accuracy": 1.0, "few_shot": 0.5}, {"accuracy": 2.0}, {"accuracy": 6.0}]
    # Deviations -2, -1, 3: variance 14 / 2.
    expected = {"accuracy": 3.0, "accuracy_std": math.sqrt(7)}
    assert metrics.mean_std(runs) == pytest.approx(expected)
    assert metrics.mean_std(runs[1:2]) == {"accuracy": 2.0, "accuracy_std": 0.0}


def one_by_one(measure, probabilities, targets, weights):
    """Measure each draw by itself, from the indices of its images."""
    rows = [measure(probabilities[index], targets[index]) for index in weights]
    return {key: [row[key] for row in rows if key in row] for key in rows[0]}


def drawn(units, draws, seed=0):
    """The indices of the images in each draw, units drawn with replacement."""
    rng = np.random.default_rng(seed)
    different = np.unique(units)
    share = np.full(len(different), 1 / len(different))
    members = [np.flatnonzero(units == unit) for unit in different]
    for times in rng.multinomial(len(different), share, draws):
        yield np.concatenate([np.tile(m, t) for m, t in zip(members, times, strict=True)])


@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_are_those_of_draws_measured_one_by_one(grouped):
    probabilities, targets = softmax_outputs(80, 4)
    probabilities = np.round(probabilities, 1)  # with ties
    counts = [150, 60, 30, 5]
    groups = np.arange(80) // 4 if grouped else None
    ends = metrics.intervals(
        probabilities, targets, class_counts=counts, groups=groups, resamples=60
    )
    rows = one_by_one(
        lambda p, t: metrics.single_label(p, t, counts),
        probabilities,
        targets,
        drawn(np.arange(80) if groups is None else groups, 60),
    )
    assert {"accuracy", "balanced_accuracy", "macro_f1", "macro_auc", "few_shot"} <= set(ends)
    for key, interval in ends.items():
        assert interval == pytest.approx(np.quantile(rows[key], [0.025, 0.975])), key


def test_intervals_of_several_labels_are_those_of_draws_measured_one_by_one():
    rng = np.random.default_rng(1)
    targets = (rng.random((60, 3)) < [0.5, 0.2, 0.03]).astype(np.uint8)
    probabilities = np.round(np.clip(0.3 * targets + 0.7 * rng.random((60, 3)), 0, 1), 1)
    thresholds = np.array([0.5, 0.35, 0.6])
    ends = metrics.intervals(probabilities, targets, thresholds=thresholds, resamples=60)
    rows = one_by_one(
        lambda p, t: metrics.multi_label(p, t, thresholds),
        probabilities,
        targets,
        drawn(np.arange(60), 60),
    )
    assert {"binary_accuracy", "balanced_accuracy", "macro_f1", "macro_auc"} <= set(ends)
    for key, interval in ends.items():
        assert interval == pytest.approx(np.quantile(rows[key], [0.025, 0.975])), key


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.8
    low, high = metrics.intervals(np.eye(2)[np.where(right, 0, 1)], np.zeros(2000, int))["accuracy"]
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.003)


def test_whole_groups_widen_an_interval():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 10)
    right = (rng.random(100) < 0.8)[groups]  # the images of a patient are right or wrong together
    probabilities, targets = np.eye(2)[np.where(right, 0, 1)], np.zeros(1000, int)
    by_image = metrics.intervals(probabilities, targets)["accuracy"]
    by_group = metrics.intervals(probabilities, targets, groups=groups)["accuracy"]
    assert np.diff(by_group) > 2.5 * np.diff(by_image)


def test_draws_do_not_depend_on_the_size_of_a_block(monkeypatch):
    probabilities, targets = softmax_outputs(50, 3)
    whole = metrics.intervals(probabilities, targets, resamples=30)
    monkeypatch.setattr(metrics, "_block", lambda images: 7)
    assert metrics.intervals(probabilities, targets, resamples=30) == whole


def test_figures_are_those_of_the_kind_of_targets():
    assert "accuracy" in metrics.figures([[0.9, 0.1]], [0])
    assert "binary_accuracy" in metrics.figures([[0.9, 0.1]], [[1, 0]])
