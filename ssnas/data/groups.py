"""Images that belong together, such as those of one patient, animal or site.

Images of one patient resemble one another. If some of them are for training and others for testing,
the test flatters the network.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssnas.errors import InputError

COLUMNS = ("image", "group")


def read_groups(rule: str, names: Sequence[str]) -> np.ndarray:
    """Look up or derive the group of each image.

    Args:
        rule: a CSV file with the columns `image` and `group`, or a regular expression whose groups
            in parentheses, those that take part in a match, name the group. An image that it does
            not match is a group by itself.
        names: of the images, relative to their folder, as `<class>/<file>`; an expression is
            matched from the beginning of the file's name, a CSV has either form.

    Returns:
        The name of each image's group, (N,).

    Raises:
        InputError: for a CSV that cannot be read or lacks an image, an expression that is none or
            has no parentheses, or one that matches no image.

    Example:
        >>> read_groups(r"(p\\d+)_", ["cat/p1_a.png", "cat/p1_b.png", "dog/p2_a.png"]).tolist()
        ['p1', 'p1', 'p2']
    """
    if rule.lower().endswith(".csv"):
        return _from_csv(Path(rule), names)
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise InputError(
            f"groups: found {rule!r}, which is no regular expression ({error}); accepted: a path "
            "to a .csv, or an expression with parentheses around the group"
        ) from None
    if not pattern.groups:
        raise InputError(
            f"groups: found {rule!r}; accepted: an expression with parentheses around the group, "
            r"such as '(patient\d+)_'"
        )
    matches = [pattern.match(name.rpartition("/")[2]) for name in names]
    if not any(matches):
        raise InputError(
            f"groups: found {rule!r}, which matches no file name, such as "
            f"{names[0].rpartition('/')[2]!r}; accepted: an expression that does"
        )
    parts = [match and [part for part in match.groups() if part] for match in matches]
    return np.array(
        ["\0".join(part) if part else name for part, name in zip(parts, names, strict=True)],
        dtype=object,
    )


def _from_csv(path: Path, names: Sequence[str]) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (table.fieldnames or [])]
            if missing:
                raise InputError(
                    f"groups: {path}: found no column {' or '.join(missing)}; accepted: a CSV with "
                    f"the columns {' and '.join(COLUMNS)}"
                )
            group_of = {row["image"]: row["group"] for row in table}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"groups: {path}: cannot be read ({error}); accepted: a CSV") from None
    groups = [group_of.get(name, group_of.get(name.rpartition("/")[2])) for name in names]
    lacking = [name for name, group in zip(names, groups, strict=True) if not group]
    if lacking:
        raise InputError(
            f"groups: {path}: found no group for {len(lacking):,} of {len(names):,} images, the "
            f"first {lacking[0]}; accepted: a row for each"
        )
    return np.array(groups, dtype=object)


def numbered(groups: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
    """Number the groups of several splits together: equal names get equal numbers.

    Example:
        >>> numbered([np.array(["b", "a"]), None, np.array(["b"])])
        [array([1, 0]), None, array([1])]
    """
    present = [values for values in groups if values is not None]
    if not present:
        return list(groups)
    texts = np.concatenate([np.asarray(values).astype(str) for values in present])
    numbers = np.unique(texts, return_inverse=True)[1].astype(np.int64)
    parts = iter(np.split(numbers, np.cumsum([len(values) for values in present])[:-1]))
    return [None if values is None else next(parts) for values in groups]


def hold_out_groups(
    classes: np.ndarray,
    groups: np.ndarray,
    class_names: Sequence[str],
    fraction: float,
    rng: np.random.Generator,
    purpose: str,
) -> np.ndarray:
    """Choose whole groups whose images are about a fraction of each class.

    Groups come in random order; one is held out if that brings the classes closer to their
    fractions. Both sides keep at least one group of every class.

    Args:
        classes: of each image, (N,).
        groups: of each image, (N,).
        fraction: the share to hold out.
        purpose: of the held-out images, in messages.

    Returns:
        Whether each image is held out, (N,).

    Raises:
        InputError: naming a class whose groups cannot be on both sides.

    Example:
        >>> classes, groups = np.arange(40) % 2, np.arange(40) // 4
        >>> held = hold_out_groups(
        ...     classes, groups, ["a", "b"], 0.2, np.random.default_rng(0), "test"
        ... )
        >>> int(held.sum()), len(np.intersect1d(groups[held], groups[~held]))
        (8, 0)
    """
    names, members = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), len(class_names)), np.int64)
    np.add.at(counts, (members, classes), 1)
    for name, having in zip(class_names, (counts > 0).sum(axis=0), strict=True):
        if having < 2:
            raise InputError(
                f"class {name!r}: found images of {having} groups to split off {purpose} images "
                "from; accepted: at least 2, one for each side"
            )
    total = counts.sum(axis=0)
    target = np.maximum(1, np.ceil(fraction * total - 0.5)).astype(np.int64)
    held = np.zeros(len(names), dtype=bool)
    taken = np.zeros_like(target)

    def may_go(group: int) -> bool:
        return bool((total - taken - counts[group] > 0).all())

    order = rng.permutation(len(names))
    for group in order:
        closer = np.abs(target - taken - counts[group]).sum() < np.abs(target - taken).sum()
        if closer and may_go(group):
            held[group], taken = True, taken + counts[group]
    for c, name in enumerate(class_names):
        if taken[c]:
            continue
        for group in order:
            if counts[group, c] and not held[group] and may_go(group):
                held[group], taken = True, taken + counts[group]
                break
        else:
            raise InputError(
                f"class {name!r}: found no group that could go to the {purpose} images and leave "
                "every class one; accepted: more, or smaller groups"
            )
    return held[members]


def folds_of_groups(
    classes: np.ndarray, groups: np.ndarray, k: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut images into k folds, whole groups and with about equal shares of each class.

    Returns:
        For each fold the sorted indices of its training and of its test images.

    Raises:
        InputError: naming `k`, if there are fewer groups, or a class in fewer than two of them.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    available = len(np.unique(groups))
    if k > available:
        raise InputError(f"k: found {k} folds for {available} groups; accepted: 2 to {available}")
    cut = StratifiedGroupKFold(k, shuffle=True, random_state=seed % 2**32)
    parts = [(train, test) for train, test in cut.split(classes, classes, groups)]
    for c in np.unique(classes):
        if any(not (classes[train] == c).any() for train, _ in parts):
            raise InputError(
                f"k: found {k} folds, one of which trains on no image of class {c}, whose images "
                "are in too few groups; accepted: classes of 2 groups or more"
            )
    return parts
