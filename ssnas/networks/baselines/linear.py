"""The linear classifier of raw pixels, the least that a network has to beat."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from ssnas.data.types import Dataset
from ssnas.runtime.mapped import chunks, spread

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

LINEAR_ITERATIONS = 300
LINEAR_VALUES = 2**24
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The inverses C of the regularisation's weight to choose from, the strongest first."""


def linear_classifier(train: Dataset, val: Dataset, test: Dataset) -> np.ndarray:
    """Probabilities (N, C) of logistic regression on standardised pixels.

    It sees at most `LINEAR_VALUES` pixel values, of training images evenly spread over all. Its
    regularisation is the first of `STRENGTHS` after which the log-loss on the validation images no
    longer falls.
    Multi-label data get one regression a label; a label without both positives and negatives
    among the training images gets its training frequency.

    Example:
        Black and white images are easy to tell apart:

        >>> pixels = np.repeat(np.array([0, 255], np.uint8), 4 * 16).reshape(8, 4, 4, 1)
        >>> data = Dataset(pixels, np.repeat([0, 1], 4), ("black", "white"))
        >>> linear_classifier(data, data, data).argmax(axis=1).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    limit = LINEAR_VALUES // train.images[0].size
    if len(train) > limit:
        train = train.take(spread(len(train), limit))
    x = _features(train.images)
    if not train.multi_label:
        probabilities = np.zeros((len(test), train.num_classes))
        seen = np.unique(train.labels)
        regression = _regularised(x, train.labels, val.images, val.labels)
        probabilities[:, seen] = _predict(regression, test.images)
        return probabilities
    columns = [
        _predict(_regularised(x, label, val.images, held_out), test.images)[:, 1]
        if label.min() != label.max()
        else np.full(len(test), label.mean())
        for label, held_out in zip(train.labels.T, val.labels.T, strict=True)
    ]
    return np.stack(columns, axis=1)


def _regularised(
    x: np.ndarray, labels: np.ndarray, val_images: np.ndarray, val_labels: np.ndarray
) -> Pipeline:
    """Weaken the regularisation for as long as the log-loss on the validation images falls."""
    known = np.isin(val_labels, labels)
    held_out = val_images[known], val_labels[known]
    best = _fitted(STRENGTHS[0], x, labels)
    least = _log_loss(best, *held_out)
    for strength in STRENGTHS[1:]:
        weaker = _fitted(strength, x, labels)
        loss = _log_loss(weaker, *held_out)
        if loss >= least:
            break
        best, least = weaker, loss
    return best


def _log_loss(regression: Pipeline, images: np.ndarray, labels: np.ndarray) -> float:
    if not len(labels):
        return 0.0
    columns = np.searchsorted(regression.classes_, labels)
    chosen = _predict(regression, images)[np.arange(len(labels)), columns]
    return float(-np.log(chosen.clip(min=np.finfo(float).tiny)).mean())


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _predict(regression: Pipeline, images: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [regression.predict_proba(_features(images[part])) for part in chunks(images)]
    )


def _fitted(strength: float, x: np.ndarray, labels: np.ndarray) -> Pipeline:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, max_iter=LINEAR_ITERATIONS)
    )
    with warnings.catch_warnings():
        # One that ends early is regularised by that, too; the validation images judge it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return regression.fit(x, labels)
