"""An estimator in scikit-learn's conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from ssnas.pipeline.fit import fit


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """A network that is trained, and if asked searched, for the images that it is fitted to.

    No test images are held out: cross-validation brings its own. A tenth of the images (one of each
    class at least) is held out for validation, so each class needs two.

    Args:
        scale: a preset of search and training, `small` or `paper`.
        loss: see `finetune.loss` in docs/parameters.md; None for the recipe's.
        decide: the decision: `balanced`, `natural`, `published`, or a frequency for each class.
        size: the side that images are resized to, in pixels; None for as they are.
        flip: whether a mirrored image is still a plausible one, as it is not for digits.
        seed: of splits, weights, order and views.
        device: `auto`, `cpu` or another device by its PyTorch name.
        search: `none` for a fixed genotype, an objective such as `barlow-twins`, or parameters of
            the section, such as `{"epochs": 5}`.
        finetune: more parameters of this section.

    Attributes:
        classes_: the classes, sorted.
        model_: the `ssnas.Model`.

    Example:
        >>> from sklearn.base import clone
        >>> clone(Classifier(loss="ce")).get_params()["loss"]
        'ce'
    """

    def __init__(
        self,
        scale: str = "small",
        loss: str | None = None,
        decide: str | Mapping[str, float] = "balanced",
        size: int | None = None,
        flip: bool = True,
        seed: int = 0,
        device: str = "auto",
        search: str | Mapping[str, Any] = "none",
        finetune: Mapping[str, Any] | None = None,
    ) -> None:
        self.scale, self.loss, self.decide = scale, loss, decide
        self.size, self.flip, self.seed, self.device = size, flip, seed, device
        self.search, self.finetune = search, finetune

    def fit(self, X: np.ndarray, y: ArrayLike) -> Classifier:
        """Train, after a search if there is one.

        Args:
            X: uint8 (N, H, W) or (N, H, W, C).
            y: classes (N,), of any type that can be sorted.

        Raises:
            InputError: for images, labels or parameters that cannot be used.
        """
        self.classes_, encoded = np.unique(np.asarray(y), return_inverse=True)
        sections: dict[str, Any] = {"search": self.search, "finetune": self.finetune}
        self.model_ = fit(
            (X, encoded),
            scale=self.scale,
            loss=self.loss,
            decide=self.decide,
            seed=self.seed,
            device=self.device,
            size=self.size,
            flip=self.flip,
            test_fraction=0.0,
            **{name: keys for name, keys in sections.items() if keys},
        )
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Compute the probability (N, C) of each class, in the order of `classes_`."""
        check_is_fitted(self)
        return self.model_.predict_proba(X)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Predict the class (N,) of each image."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]
