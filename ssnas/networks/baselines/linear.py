"""The linear classifier of raw pixels, the least that a network has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ssnas.data.types import Dataset

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

LINEAR_ITERATIONS = 300


def linear_classifier(train: Dataset, test: Dataset) -> np.ndarray:
    """Probabilities (N, C) of logistic regression on standardised pixels.

    Multi-label data get one regression a label; a label without both positives and negatives
    among the training images gets its training frequency.

    Example:
        Black and white images are easy to tell apart:

        >>> pixels = np.repeat(np.array([0, 255], np.uint8), 4 * 16).reshape(8, 4, 4, 1)
        >>> data = Dataset(pixels, np.repeat([0, 1], 4), ("black", "white"))
        >>> linear_classifier(data, data).argmax(axis=1).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """
    x, shown = (data.images.reshape(len(data), -1) / 255.0 for data in (train, test))
    if not train.multi_label:
        probabilities = np.zeros((len(shown), train.num_classes))
        seen = np.unique(train.labels)
        probabilities[:, seen] = _regression().fit(x, train.labels).predict_proba(shown)
        return probabilities
    columns = [
        _regression().fit(x, label).predict_proba(shown)[:, 1]
        if label.min() != label.max()
        else np.full(len(shown), label.mean())
        for label in train.labels.T
    ]
    return np.stack(columns, axis=1)


def _regression() -> Pipeline:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=LINEAR_ITERATIONS))
