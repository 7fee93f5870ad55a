"""Figures for skewed data, and those of a constant predictor on the same data.

Inputs are arrays or tensors; figures are plain floats. A class without test images has no recall,
and a class or label without both positives and negatives has no AUC: means leave these out, so
that no figure is NaN. Where no class has an AUC, as when the targets hold a single class, the
figure itself is left out.

scikit-learn is imported by the functions that use it, so that training loads without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ssnas.errors import InputError

Array = ArrayLike | Tensor

SHOT_GROUPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "many_shot": lambda counts: counts > 100,
    "medium_shot": lambda counts: (counts >= 20) & (counts <= 100),
    "few_shot": lambda counts: counts < 20,
}
"""Classes by their training images (Liu et al. 2019)."""

_CALIBRATION_BINS = 15
_KNN_CHUNK = 512


def figures(
    probabilities: Array,
    targets: Array,
    class_counts: Sequence[int] | None = None,
    thresholds: ArrayLike = 0.5,
) -> dict[str, float]:
    """Compute the figures of `multi_label` for multi-hot targets, else those of `single_label`.

    Example:
        >>> figures([[0.9, 0.1], [0.8, 0.2]], [0, 0])["accuracy"]
        1.0
    """
    if _numpy(targets).ndim == 2:
        return multi_label(probabilities, targets, thresholds)
    return single_label(probabilities, targets, class_counts)


def single_label(
    probabilities: Array, targets: Array, class_counts: Sequence[int] | None = None
) -> dict[str, float]:
    """Compute the figures of class probabilities, in [0, 1] but for the log-loss.

    - `accuracy`, and `error_rate`, its complement (DVC takes a key named `error` for a failure)
    - `balanced_accuracy`: the mean recall of the classes
    - `macro_f1`: the mean F1 of the classes
    - `macro_auc`: the mean area under the ROC curve, each class against the rest
    - `expected_calibration_error` (Guo et al. 2017)
    - `log_loss`: the mean of −log p of the true class, not limited to [0, 1]

    With `class_counts` also:

    - `longtail_accuracy`: Σ_c n_c recall_c / Σ_c n_c, the accuracy expected on test images that
      are as long-tailed as the training images n (the second test set of Yan 2024)
    - `many_shot`, `medium_shot`, `few_shot`: the mean recall of the classes with more than 100,
      20 to 100 and fewer than 20 training images (Liu et al. 2019), where the targets hold any

    Args:
        probabilities: (N, C).
        targets: class indices (N,).
        class_counts: n, the training images of each of the C classes.

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        Two of three images are right: both of class 0, none of class 1.

        >>> figures = single_label([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], [0, 0, 1])
        >>> round(figures["accuracy"], 4), figures["balanced_accuracy"]
        (0.6667, 0.5)
    """
    from sklearn.metrics import f1_score

    probabilities, targets = _checked(probabilities, targets)
    recall = np.array(per_class_recall(probabilities, targets))
    predictions = probabilities.argmax(axis=1)
    accuracy = float((predictions == targets).mean())
    measured = {
        "accuracy": accuracy,
        "error_rate": 1 - accuracy,
        "balanced_accuracy": float(np.nanmean(recall)),
        "macro_f1": float(
            f1_score(
                targets, predictions, labels=np.unique(targets), average="macro", zero_division=0
            )
        ),
        **_mean_defined(
            "macro_auc", per_label_auc(probabilities, np.eye(len(recall), dtype=int)[targets])
        ),
        "expected_calibration_error": _expected_calibration_error(
            probabilities.max(axis=1), predictions == targets
        ),
        "log_loss": _log_loss(probabilities[np.arange(len(targets)), targets]),
    }
    if class_counts is not None:
        counts = np.where(np.isnan(recall), 0, class_counts)
        if counts.any():
            measured["longtail_accuracy"] = float(np.average(np.nan_to_num(recall), weights=counts))
        measured |= _shot_accuracies(recall, np.asarray(class_counts))
    return measured


def multi_label(
    probabilities: Array, targets: Array, thresholds: ArrayLike = 0.5
) -> dict[str, float]:
    """Compute the figures of label probabilities, in [0, 1] but for the log-loss.

    - `binary_accuracy`: the share of the N·L labels on the right side of their threshold
    - `error_rate`: its complement
    - `balanced_accuracy`: the mean of the labels' sensitivity and specificity
    - `macro_f1`: the mean F1 of the labels
    - `macro_auc`: the mean area under the ROC curve of the labels
    - `macro_average_precision`: the mean average precision of the labels
    - `expected_calibration_error` (Guo et al. 2017): of all N·L probabilities, each against the
      share of positives; a label's probability below ½ is one of its absence
    - `log_loss`: the mean binary cross-entropy of the N·L labels, not limited to [0, 1]

    The macro means are over the labels that have both positives and negatives.

    Args:
        probabilities: (N, L).
        targets: multi-hot rows (N, L).
        thresholds: the probability above which an image is given a label: one for all, or (L,).

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        >>> multi_label([[0.9, 0.2], [0.4, 0.6]], [[1, 0], [0, 0]])["binary_accuracy"]
        0.75
    """
    from sklearn.metrics import average_precision_score

    probabilities, targets = _checked(probabilities, targets)
    precisions = [
        average_precision_score(target, probability) if _has_both(target) else np.nan
        for target, probability in zip(targets.T, probabilities.T, strict=True)
    ]
    predicted, positive = probabilities > thresholds, targets.astype(bool)
    right = predicted == positive
    both = np.array([_has_both(target) for target in targets.T])
    with np.errstate(invalid="ignore"):
        sensitivity = (right & positive).sum(axis=0) / positive.sum(axis=0)
        specificity = (right & ~positive).sum(axis=0) / (~positive).sum(axis=0)
        f1 = 2 * (predicted & positive).sum(axis=0) / (predicted.sum(0) + positive.sum(0))
    of_outcome = np.where(positive, probabilities, 1 - probabilities)
    accuracy = float(right.mean())
    return {
        "binary_accuracy": accuracy,
        "error_rate": 1 - accuracy,
        **_mean_defined("balanced_accuracy", ((sensitivity + specificity) / 2)[both]),
        **_mean_defined("macro_f1", f1[both]),
        **_mean_defined("macro_auc", per_label_auc(probabilities, targets)),
        **_mean_defined("macro_average_precision", precisions),
        "expected_calibration_error": _expected_calibration_error(
            np.maximum(probabilities, 1 - probabilities).ravel(),
            ((probabilities > 0.5) == positive).ravel(),
        ),
        "log_loss": _log_loss(of_outcome.ravel()),
    }


def per_class_recall(probabilities: Array, targets: Array) -> list[float]:
    """Compute the recall of each class.

    Args:
        probabilities: (N, C).
        targets: class indices (N,).

    Returns:
        C recalls in [0, 1]; NaN for a class without test images.

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        >>> per_class_recall([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 0, 1])
        [0.5, 1.0]
    """
    counts = confusion(probabilities, targets)
    images = counts.sum(axis=1)
    return [
        float(hits / total) if total else float("nan")
        for hits, total in zip(counts.diagonal(), images, strict=True)
    ]


def per_label_auc(probabilities: Array, targets: Array) -> list[float]:
    """Compute the area under the ROC curve of each label.

    Args:
        probabilities: (N, L).
        targets: multi-hot rows (N, L).

    Returns:
        L areas in [0, 1]; NaN for a label without both positives and negatives.

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        Of the four pairs of a positive and a negative, three are in order:

        >>> per_label_auc([[0.9], [0.3], [0.4], [0.1]], [[1], [1], [0], [0]])
        [0.75]
    """
    from sklearn.metrics import roc_auc_score

    probabilities, targets = _checked(probabilities, targets)
    return [
        float(roc_auc_score(target, probability)) if _has_both(target) else float("nan")
        for target, probability in zip(targets.T, probabilities.T, strict=True)
    ]


def confusion(probabilities: Array, targets: Array, thresholds: ArrayLike = 0.5) -> np.ndarray:
    """Count the test images of each actual class (row) that are given each class (column).

    For multi-hot targets: the images that have the row's label and are given the column's.

    Args:
        probabilities: (N, C).
        targets: class indices (N,) or multi-hot rows (N, L) with L = C.
        thresholds: of multi-hot targets, as in `multi_label`.

    Returns:
        Integers (C, C).

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        >>> confusion([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], [0, 0, 1]).tolist()
        [[1, 1], [0, 1]]
    """
    from sklearn.metrics import confusion_matrix

    probabilities, targets = _checked(probabilities, targets)
    if targets.ndim == 2:
        counts: np.ndarray = targets.astype(int).T @ (probabilities > thresholds).astype(int)
    else:
        classes = np.arange(probabilities.shape[1])
        counts = confusion_matrix(targets, probabilities.argmax(axis=1), labels=classes)
    return counts


def constant_predictor(train_labels_or_priors: Array, targets: Array) -> dict[str, float]:
    """Compute the figures of a predictor that gives every image the training frequencies.

    On single-label data it always predicts the most frequent class.

    Args:
        train_labels_or_priors: the training labels, integers (N,) or multi-hot rows (N, L), or
            the frequencies themselves, floats (C,).
        targets: those of the test images, class indices (M,) or multi-hot rows (M, L).

    Returns:
        The figures of `single_label` or `multi_label`.

    Raises:
        InputError: for no test images.

    Example:
        Class 0 is the more frequent one in training, and two of three test images belong to it:

        >>> figures = constant_predictor([0, 0, 0, 1], [0, 0, 1])
        >>> round(figures["accuracy"], 4), figures["balanced_accuracy"]
        (0.6667, 0.5)
    """
    priors, targets = _numpy(train_labels_or_priors), _numpy(targets)
    if priors.ndim == 2:
        priors = priors.mean(axis=0)
    elif np.issubdtype(priors.dtype, np.integer):
        priors = np.bincount(priors, minlength=targets.max() + 1) / len(priors)
    return figures(np.tile(priors, (len(targets), 1)), targets)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
) -> float:
    """Compute the accuracy of a majority vote among the nearest training features.

    The neighbours are the `k` training features of greatest cosine similarity. Ties go to the
    lower class index.

    Args:
        train_features: (N, D).
        train_labels: class indices (N,), on the device of the features, as all others.
        test_features: (M, D).
        test_labels: class indices (M,).
        k: how many neighbours vote; with fewer training features all of them do.

    Returns:
        The accuracy in [0, 1].

    Example:
        >>> train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> knn_accuracy(train, labels, torch.tensor([[2.0, 1.0], [3.0, 1.0]]), labels, k=1)
        0.5
    """
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    k = min(k, len(train))
    correct = 0
    for features, labels in zip(test.split(_KNN_CHUNK), test_labels.split(_KNN_CHUNK), strict=True):
        neighbours = (features @ train.T).topk(k, dim=1).indices
        votes = F.one_hot(train_labels[neighbours]).sum(dim=1)
        correct += (votes.argmax(dim=1) == labels).sum()
    return float(correct) / len(test)


def intervals(
    probabilities: Array,
    targets: Array,
    *,
    class_counts: Sequence[int] | None = None,
    thresholds: ArrayLike = 0.5,
    ranking: Array | None = None,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Compute percentile intervals of figures by the bootstrap over test images (Efron 1979).

    Test images are drawn with replacement, as many as there are, and each draw is measured as
    `figures` measures the whole. They say how much a figure depends on the choice of test images,
    and nothing of other seeds of the training.

    Args:
        probabilities: (N, C).
        targets: class indices (N,) or multi-hot rows (N, C).
        class_counts: the training images of each class, for the figures by their number.
        thresholds: of multi-hot targets, as in `multi_label`.
        ranking: (N, C), what the AUC is of; None for `probabilities`.
        groups: what belongs together (N,), such as the patient of each image: whole groups are
            drawn; None for image by image.
        resamples: the number of draws.
        level: the share of the draws within the interval.
        seed: of the draws.

    Returns:
        The lower and the upper end for accuracy (binary accuracy), error, balanced accuracy, macro
        F1, macro AUC and the shot groups, each where it is defined.

    Raises:
        InputError: for no images, or for probabilities that are not finite.

    Example:
        Nine of ten images are right:

        >>> low, high = intervals(np.eye(2)[[0] * 10], [0] * 9 + [1])["accuracy"]
        >>> round(low, 2), round(high, 2)
        (0.7, 1.0)
    """
    probabilities, targets = _checked(probabilities, targets)
    units = np.arange(len(targets)) if groups is None else np.asarray(groups)
    _, unit = np.unique(units, return_inverse=True)
    if targets.ndim == 2:
        measure, positive = _multi_label_by_weights(probabilities, targets, thresholds), targets > 0
    else:
        measure = _single_label_by_weights(probabilities, targets, class_counts)
        positive = np.eye(probabilities.shape[1], dtype=bool)[targets]
    areas = _areas_by_weights(probabilities if ranking is None else _numpy(ranking), positive)
    rng, units_drawn, block = np.random.default_rng(seed), unit.max() + 1, _block(len(targets))
    share = np.full(units_drawn, 1 / units_drawn)
    blocks = []
    for start in range(0, resamples, block):
        times = rng.multinomial(units_drawn, share, min(block, resamples - start))
        weights = times[:, unit].astype(np.float64)
        blocks.append(measure(weights) | {"macro_auc": areas(weights)})
    tail = (1 - level) / 2
    ends = {}
    for key in blocks[0]:
        values = np.concatenate([block[key] for block in blocks])
        if not np.isnan(values).all():
            low, high = np.nanquantile(values, [tail, 1 - tail])
            ends[key] = (float(low), float(high))
    return ends


def mean_std(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Compute the mean (`key`) and standard deviation (`key_std`) of each figure over runs.

    The deviation is the sample's (n − 1), and 0 for a single run. Figures that a run lacks are
    left out.

    Example:
        >>> mean_std([{"accuracy": 1.0}, {"accuracy": 3.0}, {"accuracy": 5.0}])
        {'accuracy': 3.0, 'accuracy_std': 2.0}
    """
    summary = {}
    for key in figures[0]:
        if all(key in run for run in figures):
            values = [run[key] for run in figures]
            summary[key] = float(np.mean(values))
            summary[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return summary


def _numpy(x: Array) -> np.ndarray:
    if isinstance(x, Tensor):
        # NumPy has no bfloat16.
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def _checked(probabilities: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
    probabilities, targets = _numpy(probabilities), _numpy(targets)
    if not len(targets):
        raise InputError("targets: found no images; accepted: at least 1")
    if not np.isfinite(probabilities).all():
        raise InputError("probabilities: found NaN or infinity; has the training diverged?")
    return probabilities, targets


def _has_both(target: np.ndarray) -> bool:
    return bool(target.min() != target.max())


def _mean_defined(key: str, values: Iterable[float]) -> dict[str, float]:
    defined = [value for value in values if not np.isnan(value)]
    return {key: float(np.mean(defined))} if defined else {}


def _expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Compute Σ_b |B_b| / N · |accuracy(B_b) − confidence(B_b)| over bins of equal width.

    B_b are the predictions whose confidence falls into bin b (Guo et al. 2017).

    Args:
        confidence: the probability of what is predicted, (N,).
        right: which predictions are right, (N,).
    """
    confidence = confidence.astype(np.float64)
    gap = right - confidence
    inner_edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, inner_edges, right=True)
    return float(np.abs(np.bincount(bins, weights=gap)).sum() / len(gap))


def _log_loss(probability: np.ndarray) -> float:
    """Compute the mean of −log p, with p at least 1e-15: one sure mistake is not everything."""
    return float(-np.log(np.maximum(probability.astype(np.float64), 1e-15)).mean())


def _shot_accuracies(recall: np.ndarray, class_counts: np.ndarray) -> dict[str, float]:
    accuracies: dict[str, float] = {}
    for key, belongs in SHOT_GROUPS.items():
        accuracies |= _mean_defined(key, recall[belongs(class_counts)])
    return accuracies


# The figures of weighted images, for many weightings at once


_Measure = Callable[[np.ndarray], dict[str, np.ndarray]]
"""A function from weights (B, N), how often each image occurs in B draws, to figures (B,)."""


def _block(images: int) -> int:
    """Return how many draws are measured at once, so that a few hundred MB are enough."""
    return max(1, 4_000_000 // images)


def _single_label_by_weights(
    probabilities: np.ndarray,
    targets: np.ndarray,
    class_counts: Sequence[int] | None,
) -> _Measure:
    classes = probabilities.shape[1]
    pairs = targets * classes + probabilities.argmax(axis=1)
    present, first, order = _grouped(pairs)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = np.zeros((len(weights), classes * classes))
        counts[:, present] = np.add.reduceat(weights[:, order], first, axis=1)
        counts = counts.reshape(-1, classes, classes)
        hits, actual = counts.diagonal(axis1=1, axis2=2), counts.sum(axis=2)
        recall = _ratio(hits, actual)
        f1 = np.where(actual > 0, _ratio(2 * hits, actual + counts.sum(axis=1)), np.nan)
        accuracy = hits.sum(axis=1) / actual.sum(axis=1)
        shots = {}
        if class_counts is not None:
            for key, belongs in SHOT_GROUPS.items():
                shots[key] = _nan_mean(recall[:, belongs(np.asarray(class_counts))])
        return {
            "accuracy": accuracy,
            "error_rate": 1 - accuracy,
            "balanced_accuracy": _nan_mean(recall),
            "macro_f1": _nan_mean(f1),
            **shots,
        }

    return measure


def _multi_label_by_weights(
    probabilities: np.ndarray,
    targets: np.ndarray,
    thresholds: ArrayLike,
) -> _Measure:
    predicted, positive = probabilities > thresholds, targets.astype(bool)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(axis=1, keepdims=True)
        hits, labelled, calls = (
            weights @ marked.astype(np.float64)
            for marked in (predicted & positive, positive, predicted)
        )
        rejections = total - labelled - (calls - hits)
        both = (labelled > 0) & (labelled < total)
        balanced = (_ratio(hits, labelled) + _ratio(rejections, total - labelled)) / 2
        f1 = _ratio(2 * hits, labelled + calls)
        accuracy = (hits + rejections).mean(axis=1) / total[:, 0]
        return {
            "binary_accuracy": accuracy,
            "error_rate": 1 - accuracy,
            "balanced_accuracy": _nan_mean(np.where(both, balanced, np.nan)),
            "macro_f1": _nan_mean(np.where(both, f1, np.nan)),
        }

    return measure


def _areas_by_weights(
    scores: np.ndarray, positive: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function from weights (B, N) to the mean area under the labels' ROC curves (B,)."""
    sorted_scores = [
        (*_grouped(column)[1:], marked) for column, marked in zip(scores.T, positive.T, strict=True)
    ]

    def areas(weights: np.ndarray) -> np.ndarray:
        columns = []
        for first, order, marked in sorted_scores:
            ordered, is_positive = weights[:, order], marked[order]
            ups = np.add.reduceat(ordered * is_positive, first, axis=1)
            downs = np.add.reduceat(ordered * ~is_positive, first, axis=1)
            # A positive is above the negatives of lower scores, and half above those of its own.
            below = downs.cumsum(axis=1) - downs / 2
            pairs = ups.sum(axis=1) * downs.sum(axis=1)
            columns.append(_ratio((ups * below).sum(axis=1), pairs))
        return _nan_mean(np.stack(columns, axis=1))

    return areas


def _grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the different keys, where each begins in their order, and the order."""
    order = np.argsort(keys, kind="stable")
    different, first = np.unique(keys[order], return_index=True)
    return different, first, order


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide, to NaN where the whole is nothing."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """Compute each row's mean without its NaN; NaN for a row of nothing else."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1))
