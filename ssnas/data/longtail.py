"""Class-count profiles of long-tailed data, and the seeded sub-sampling that follows them.

To add a profile, write its formula here and give it a line in `FORMULAS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from ssnas.errors import InputError


def exponential(c: int, classes: int, mu: float) -> float:
    """Geometric decline: n_c / n = μ^(c / (C − 1)) (Cao et al. 2019, LDAM; Yan 2024).

    Example:
        >>> [exponential(c, classes=3, mu=0.01) for c in range(3)]
        [1.0, 0.1, 0.01]
    """
    return float(mu ** (c / (classes - 1)))


def power(c: int, classes: int, mu: float) -> float:
    """Power of a base: n_c / n = β^(c + 1), β = μ^(1 / (C − 1)) (Timofeev et al. 2021).

    Its largest class already loses a factor β.

    Example:
        >>> [round(power(c, classes=3, mu=0.01), 4) for c in range(3)]
        [0.1, 0.01, 0.001]
    """
    return float(mu ** ((c + 1) / (classes - 1)))


def step(c: int, classes: int, mu: float) -> float:
    """Two levels: n_c / n = μ for the last ⌊C / 2⌋ classes, 1 for the others (Yan 2024).

    For an odd C the middle class stays whole.

    Example:
        >>> [step(c, classes=5, mu=0.1) for c in range(5)]
        [1.0, 1.0, 1.0, 0.1, 0.1]
    """
    return 1.0 if c < classes - classes // 2 else mu


def balanced(c: int, classes: int, mu: float) -> float:
    """Full classes: n_c / n = 1, whatever the imbalance.

    Example:
        >>> balanced(2, classes=3, mu=0.01)
        1.0
    """
    return 1.0


FORMULAS = {"exponential": exponential, "power": power, "step": step, "balanced": balanced}
"""The share of a full class that class c of C keeps, for an imbalance factor ρ = 1 / μ."""

PROFILES = ("natural", *FORMULAS)
"""`natural` keeps a data set as it is, and so has no formula."""


def class_counts(n: int, num_classes: int, profile: str, imbalance: float) -> list[int]:
    """Compute how many images each class keeps, largest class first.

    n_c = ⌊n · share of class c⌋, with the share by `FORMULAS`.

    Args:
        n: the images of a full class, at least 1.
        num_classes: C, at least 2.
        profile: a key of `FORMULAS`.
        imbalance: ρ, the largest class over the smallest, at least 1.

    Returns:
        C counts.

    Raises:
        InputError: naming `n`, `num_classes`, `profile` (`natural` has no counts) or `imbalance`.

    Example:
        >>> class_counts(100, 3, "exponential", imbalance=4)
        [100, 50, 25]
        >>> class_counts(100, 4, "step", imbalance=10)
        [100, 100, 10, 10]
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
    """Draw `counts[c]` images of every class c without replacement.

    Generators of equal state draw nested sets: a larger count keeps what a smaller one keeps, so
    that profiles of one seed can be compared.

    Args:
        labels: class indices (N,).
        counts: a number of images for each class.
        rng: what the images are drawn from.
        class_names: how messages name the classes; None for their numbers.

    Returns:
        Sorted indices into `labels`.

    Raises:
        InputError: naming a class of which no image is asked for, or more than it has.

    Example:
        >>> labels = np.array([0, 0, 0, 1, 1])
        >>> chosen = subsample(labels, [2, 1], np.random.default_rng(0))
        >>> labels[chosen].tolist()
        [0, 0, 1]
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
    """Tell whether `value` is an integer of at least `lowest`; True and False are none.

    Example:
        >>> is_integer(3, lowest=1), is_integer(3.0, lowest=1), is_integer(True, lowest=1)
        (True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value) >= lowest
