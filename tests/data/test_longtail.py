"""Class counts against published and hand-computed figures; sub-sampling against invariants."""

import numpy as np
import pytest

from ssnas.data.longtail import PROFILES, class_counts, subsample
from ssnas.errors import InputError

CIFAR10_LT_10 = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
CIFAR10_LT_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_published_cifar10_lt():
    assert class_counts(5000, 10, "exponential", 10) == CIFAR10_LT_10
    assert sum(CIFAR10_LT_10) == 20431
    assert class_counts(5000, 10, "exponential", 100) == CIFAR10_LT_100


@pytest.mark.parametrize(
    ("n", "classes", "profile", "imbalance", "expected"),
    [
        (100, 3, "exponential", 4, [100, 50, 25]),
        (100, 3, "power", 4, [50, 25, 12]),  # beta = 1/2: 50, 25, floor(12.5)
        (100, 2, "power", 10, [10, 1]),  # beta = 1/10
        (100, 4, "step", 8, [100, 100, 12, 12]),  # floor(12.5)
        (100, 5, "step", 10, [100, 100, 100, 10, 10]),  # the middle class stays whole
        (100, 3, "balanced", 10, [100, 100, 100]),
        (100, 3, "exponential", 1, [100, 100, 100]),
        (3, 2, "exponential", 10, [3, 0]),
    ],
)
def test_counts_by_hand(n, classes, profile, imbalance, expected):
    assert class_counts(n, classes, profile, imbalance) == expected


@pytest.mark.parametrize("base", [2, 3, 5, 7, 10])
def test_exact_powers_are_not_floored_below_themselves(base):
    n, classes = base**5, 6
    assert class_counts(n, classes, "exponential", base**5) == [base**k for k in (5, 4, 3, 2, 1, 0)]


def test_largest_power_class_is_the_second_exponential_one():
    power = class_counts(5000, 10, "power", 10)
    assert power[:-1] == CIFAR10_LT_10[1:]
    assert power[-1] == 387  # floor(5000 * 10 ** (-10 / 9))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((100, 3, "exponential", 0.5), ("imbalance", "0.5", "from 1 up")),
        ((100, 3, "exponential", float("nan")), ("imbalance", "nan")),
        ((100, 3, "exponential", float("inf")), ("imbalance", "inf")),
        ((100, 3, "exponential", "10"), ("imbalance", "'10'")),
        ((100, 3, "linear", 10), ("profile", "'linear'", "exponential, power, step, balanced")),
        ((100, 3, "natural", 10), ("profile", "'natural'", "exponential, power, step, balanced")),
        ((100, 1, "step", 10), ("num_classes", "1", "at least 2")),
        ((0, 3, "step", 10), ("n: ", "0", "at least 1")),
        ((10.5, 3, "step", 10), ("n: ", "10.5")),
        ((True, 3, "step", 10), ("n: ", "True")),
    ],
)
def test_wrong_arguments_are_named(arguments, parts):
    with pytest.raises(InputError) as caught:
        class_counts(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_profiles_are_those_with_a_formula_and_natural():
    assert PROFILES == ("natural", "exponential", "power", "step", "balanced")


def test_subsample_has_the_counts_asked_for():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 50))
    chosen = subsample(labels, [50, 20, 1], np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [50, 20, 1]
    assert (np.diff(chosen) > 0).all()


def test_subsample_follows_its_generator():
    labels = np.repeat([0, 1], 100)
    first, same, other = (
        subsample(labels, [30, 30], np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert first.tolist() == same.tolist()
    assert first.tolist() != other.tolist()


def test_smaller_counts_are_nested_in_larger_ones():
    labels = np.tile([0, 1, 2], 40)
    large, small = (
        subsample(labels, counts, np.random.default_rng(3))
        for counts in ([40, 30, 20], [40, 10, 5])
    )
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("counts", "names", "parts"),
    [
        ([3, 5], None, ("class 1", "5 images", "at most the 4")),
        ([3, 5], ("cat", "dog"), ("class 'dog'", "5 images")),
        ([0, 4], ("cat", "dog"), ("class 'cat'", "0 images", "at least 1", "`imbalance`")),
        ([3], None, ("counts", "1 counts for 2 classes")),
    ],
)
def test_impossible_counts_name_the_class(counts, names, parts):
    with pytest.raises(InputError) as caught:
        subsample(np.repeat([0, 1], [3, 4]), counts, np.random.default_rng(0), names)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_multi_hot_labels_have_no_classes_to_subsample():
    with pytest.raises(InputError, match=r"labels: found shape \(4, 2\)"):
        subsample(np.ones((4, 2), int), [1, 1], np.random.default_rng(0))
