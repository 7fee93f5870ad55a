"""The names of decisions, and priors by class: what `decide` and `prior` accept.

`ssnas.decision` says what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ssnas.errors import InputError

DECISIONS = ("published", "balanced", "natural")
"""By the softmax of the logits, with a uniform prior, or with the training frequencies."""

MULTI_LABEL_DECISIONS = (*DECISIONS, "f1")
"""Also `f1`: natural probabilities, and for each label the threshold of `f1_thresholds`."""

Prior = str | Mapping[str, float] | Sequence[float]
"""A decision by name, or the frequencies of the place of use, by class name or in order."""


def named_prior(
    decide: Prior, class_names: Sequence[str], multi_label: bool = False
) -> str | list[float]:
    """Check a decision, and bring a prior by class name into the order of the classes.

    Raises:
        InputError: for an unknown decision, `f1` for single labels, or a class that is missing or
            not one of the model's.

    Example:
        >>> named_prior({"dog": 0.1, "cat": 0.9}, ["cat", "dog"])
        [0.9, 0.1]
    """
    if isinstance(decide, str):
        names = MULTI_LABEL_DECISIONS if multi_label else DECISIONS
        if decide not in names:
            raise InputError(
                f"decide: found {decide!r}; choose from {', '.join(names)}, or give a frequency "
                "for each class"
            )
        return decide
    if isinstance(decide, Mapping):
        missing = [name for name in class_names if name not in decide]
        if missing or len(decide) > len(class_names):
            raise InputError(
                f"decide: found {', '.join(map(str, decide))}; accepted: a frequency for each of "
                f"{', '.join(class_names)}"
            )
        decide = [decide[name] for name in class_names]
    return check_frequencies(decide, len(class_names), multi_label).tolist()


def check_frequencies(prior: ArrayLike, classes: int, multi_label: bool) -> np.ndarray:
    """Check the frequencies of classes, and let those of single labels add up to 1.

    Raises:
        InputError: naming them and what is accepted.

    Example:
        >>> check_frequencies([1, 3], classes=2, multi_label=False)
        array([0.25, 0.75])
    """
    try:
        rho = np.asarray(prior, dtype=np.float64)
    except (TypeError, ValueError):
        rho = np.empty(0)
    valid = rho.shape == (classes,) and np.isfinite(rho).all() and rho.min() >= 0 < rho.max()
    if not valid or (multi_label and rho.max() > 1):
        limits = "in [0, 1]" if multi_label else "at least 0, not all 0"
        raise InputError(f"prior: found {prior!r}; accepted: {classes} frequencies, {limits}")
    return rho if multi_label else rho / rho.sum()
