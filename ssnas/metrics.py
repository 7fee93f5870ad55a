"""Figures for skewed data, and what a constant predictor gets on the same data.

Inputs are arrays or tensors; figures are plain floats. A mean over classes or labels leaves out
those that the targets leave undefined, so no figure is NaN: a class without test images has no
recall, and a class or label without both positives and negatives has no AUC. Where none has an
AUC, as when the targets hold a single class, the dict lacks that figure.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)
from torch import Tensor

from ssnas.errors import InputError

Array = ArrayLike | Tensor

_CALIBRATION_BINS = 15
_KNN_CHUNK = 512


def single_label(
    probabilities: Array, targets: Array, class_counts: Sequence[int] | None = None
) -> dict[str, float]:
    """Figures of class probabilities (N, C) against class indices (N,), all in [0, 1].

    `accuracy`, `error_rate` (1 − accuracy; DVC takes a key named `error` for a failure),
    `balanced_accuracy` (mean recall), `macro_f1`, `macro_auc` (one class against the rest) and
    `expected_calibration_error`. With `class_counts`, the training images of each class, also
    `longtail_accuracy`, that on test images as long-tailed as the training images
    (Σ_c n_c recall_c / Σ_c n_c, the expectation over all such subsets of the test images; Yan
    2024's second test set), and the mean recall of the classes with more than 100 images
    (`many_shot`), 20 to 100 (`medium_shot`) and fewer than 20 (`few_shot`) (Liu et al. 2019), each
    where the targets hold such classes.

    Raises `InputError` for no images or probabilities that are not finite.
    """
    probabilities, targets = _checked(probabilities, targets)
    recall = np.array(per_class_recall(probabilities, targets))
    predictions = probabilities.argmax(axis=1)
    accuracy = float((predictions == targets).mean())
    figures = {
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
        "expected_calibration_error": _expected_calibration_error(probabilities, targets),
    }
    if class_counts is not None:
        counts = np.where(np.isnan(recall), 0, class_counts)
        if counts.any():
            figures["longtail_accuracy"] = float(np.average(np.nan_to_num(recall), weights=counts))
        figures |= _shot_accuracies(recall, np.asarray(class_counts))
    return figures


def multi_label(probabilities: Array, targets: Array) -> dict[str, float]:
    """Figures of label probabilities (N, L) against multi-hot targets (N, L), all in [0, 1].

    `binary_accuracy` (share of the N·L labels on the right side of ½), `macro_auc` and
    `macro_average_precision`, both over the labels with positives and negatives.

    Raises `InputError` for no images or probabilities that are not finite.
    """
    probabilities, targets = _checked(probabilities, targets)
    precisions = [
        average_precision_score(target, probability) if _has_both(target) else np.nan
        for target, probability in zip(targets.T, probabilities.T, strict=True)
    ]
    return {
        "binary_accuracy": float(((probabilities > 0.5) == targets).mean()),
        **_mean_defined("macro_auc", per_label_auc(probabilities, targets)),
        **_mean_defined("macro_average_precision", precisions),
    }


def per_class_recall(probabilities: Array, targets: Array) -> list[float]:
    """Recall of each of the C classes; NaN for a class without test images."""
    counts = confusion(probabilities, targets)
    images = counts.sum(axis=1)
    return [
        float(hits / total) if total else float("nan")
        for hits, total in zip(counts.diagonal(), images, strict=True)
    ]


def per_label_auc(probabilities: Array, targets: Array) -> list[float]:
    """Area under the ROC curve of each of the L labels, from (N, L) probabilities and multi-hot
    targets; NaN for a label without both positives and negatives."""
    probabilities, targets = _checked(probabilities, targets)
    return [
        float(roc_auc_score(target, probability)) if _has_both(target) else float("nan")
        for target, probability in zip(targets.T, probabilities.T, strict=True)
    ]


def confusion(probabilities: Array, targets: Array) -> np.ndarray:
    """Counts (C, C) of test images: row the actual class, column the predicted one.

    For multi-hot targets (N, L): images that have the row's label and are given the column's.
    """
    probabilities, targets = _checked(probabilities, targets)
    if targets.ndim == 2:
        return targets.astype(int).T @ (probabilities > 0.5).astype(int)
    classes = np.arange(probabilities.shape[1])
    return confusion_matrix(targets, probabilities.argmax(axis=1), labels=classes)


def constant_predictor(
    train_labels_or_priors: Array, targets: Array, multi_label: bool
) -> dict[str, float]:
    """Figures of the predictor that gives every test image the training frequencies.

    The first argument is the training labels (integers, (N,) indices or (N, L) multi-hot) or the
    frequencies themselves (floats, (C,)); the keys are those of `single_label` or `multi_label`.
    On single-label data it always predicts the most frequent class.
    """
    priors, targets = _numpy(train_labels_or_priors), _numpy(targets)
    if priors.ndim == 2:
        priors = priors.mean(axis=0)
    elif np.issubdtype(priors.dtype, np.integer):
        priors = np.bincount(priors, minlength=targets.max() + 1) / len(priors)
    return _FIGURES[multi_label](np.tile(priors, (len(targets), 1)), targets)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
) -> float:
    """Accuracy of a majority vote among the k training features of greatest cosine similarity.

    Features are (N, D), labels (N,) class indices, all on one device. Ties go to the lower class
    index; with fewer than k training features all of them vote.
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


def mean_std(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean (`key`) and sample standard deviation (`key_std`, n − 1) of each figure over runs.

    Only figures that every run has. A single run has a deviation of 0.
    """
    summary = {}
    for key in figures[0]:
        if all(key in run for run in figures):
            values = [run[key] for run in figures]
            summary[key] = float(np.mean(values))
            summary[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return summary


_FIGURES = {False: single_label, True: multi_label}


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
    return target.min() != target.max()


def _mean_defined(key: str, values: Sequence[float]) -> dict[str, float]:
    defined = [value for value in values if not np.isnan(value)]
    return {key: float(np.mean(defined))} if defined else {}


def _expected_calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Σ_b |B_b| / N · |accuracy(B_b) − confidence(B_b)| over equal-width bins (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    gap = (probabilities.argmax(axis=1) == targets) - confidence
    inner_edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, inner_edges, right=True)
    return float(np.abs(np.bincount(bins, weights=gap)).sum() / len(gap))


def _shot_accuracies(recall: np.ndarray, class_counts: np.ndarray) -> dict[str, float]:
    groups = {
        "many_shot": class_counts > 100,
        "medium_shot": (class_counts >= 20) & (class_counts <= 100),
        "few_shot": class_counts < 20,
    }
    shots = {}
    for key, members in groups.items():
        shots |= _mean_defined(key, recall[members])
    return shots
