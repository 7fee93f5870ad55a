"""Class-count profiles of long-tailed data, and the seeded sub-sampling that realises them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from ssnas.errors import InputError

FORMULAS = {
    "exponential": lambda c, classes, mu: mu ** (c / (classes - 1)),
    "power": lambda c, classes, mu: mu ** ((c + 1) / (classes - 1)),
    "step": lambda c, classes, mu: 1.0 if c < classes - classes // 2 else mu,
    "balanced": lambda c, classes, mu: 1.0,
}
PROFILES = ("natural", *FORMULAS)


def class_counts(n: int, num_classes: int, profile: str, imbalance: float) -> list[int]:
    """Images that each class keeps under a profile, largest class first.

    With n the images of a full class, C classes, rho = `imbalance` and mu = 1 / rho:

    - `exponential`: n_c = floor(n mu^(c / (C - 1)))  (Cao et al. 2019, "Learning Imbalanced
      Datasets with Label-Distribution-Aware Margin Loss"; Yan 2024)
    - `power`: n_c = floor(beta^(c + 1) n), beta = rho^(-1 / (C - 1))  (Timofeev et al. 2021);
      its largest class already loses a factor beta
    - `step`: the last floor(C / 2) classes keep floor(mu n), the others n  (Yan 2024); for an
      odd C the middle class stays whole
    - `balanced`: n for every class, whatever the imbalance

    Returns C counts. `natural` keeps a data set as it is, so it has no formula and is refused.
    Raises InputError naming `n`, `num_classes`, `profile` or `imbalance`.
    """
    if not is_integer(n, 1):
        raise InputError(f"n: found {n!r}; accepted: an integer of at least 1")
    if not is_integer(num_classes, 2):
        raise InputError(f"num_classes: found {num_classes!r}; accepted: an integer of at least 2")
    if profile not in FORMULAS:
        raise InputError(f"profile: found {profile!r}; accepted: {', '.join(FORMULAS)}")
    if not isinstance(imbalance, Real) or not 1 <= imbalance < math.inf:
        raise InputError(f"imbalance: found {imbalance!r}; accepted: a finite number from 1 up")
    share = FORMULAS[profile]
    # 5000 * 0.1 ** (9 / 9) may come out as 499.99999999999994: rounding first keeps it a 500.
    return [
        math.floor(round(n * share(c, num_classes, 1 / imbalance), 6)) for c in range(num_classes)
    ]


def subsample(
    labels: np.ndarray,
    counts: Sequence[int],
    rng: np.random.Generator,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Indices, sorted, of `counts[c]` images drawn without replacement from every class c.

    `labels` are (N,) class indices. Equal generators draw nested sets: what a smaller count
    keeps, a larger one keeps too, so profiles of one seed can be compared.

    Raises InputError naming the class (by `class_names` where given) that is asked for no image
    or for more than it has.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise InputError(f"labels: found shape {labels.shape}; accepted: (N,) class indices")
    if labels.size and labels.max() >= len(counts):
        raise InputError(
            f"counts: found {len(counts)} counts for {labels.max() + 1} classes; accepted: one each"
        )
    chosen = []
    for c, count in enumerate(counts):
        members = rng.permutation(np.flatnonzero(labels == c))
        name = repr(class_names[c]) if class_names is not None else c
        if count < 1:
            raise InputError(
                f"class {name}: {count} images asked for; accepted: at least 1 "
                "(lower `imbalance`, or start from larger classes)"
            )
        if count > len(members):
            raise InputError(
                f"class {name}: {count} images asked for; accepted: at most the "
                f"{len(members)} that it has"
            )
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))


def is_integer(value: object, lowest: int) -> bool:
    """Whether value is an integer (True and False are none) and at least `lowest`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= lowest
