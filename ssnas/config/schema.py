"""Parameters as typed, validated, frozen objects.

The defaults are the papers'. Where another module's table says what a key accepts, the key names
that table (`module:name`), so that a loss, an operation or a data set is added in one place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ssnas.errors import InputError

TRANSFER_WEIGHTS = ("search", "finetune", "none")


def _key(default: Any, **limits: Any) -> Any:
    """Declare a field with its limits: `choices`, `low` (≥), `above` (>), `high` (≤).

    `choices` are the values themselves, or `module:name` of the table or function that has them.
    """
    return dataclasses.field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """Images and how they become a long-tailed split (see `ssnas.data.split`)."""

    dataset: str = "digits"
    size: int | None = _key(None, low=8)
    channels: str = _key("keep", choices="ssnas.data.folders:CHANNELS")
    profile: str = _key("exponential", choices="ssnas.data.longtail:PROFILES")
    imbalance: float = _key(10.0, low=1.0)
    largest_class: int | None = _key(None, low=1)
    max_images: int | None = _key(None, low=2)
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    test_fraction: float = _key(0.2, above=0.0, high=0.5)
    bad_images: str = _key("error", choices="ssnas.data.folders:BAD_IMAGES")
    flip: bool | None = None


@dataclass(frozen=True)
class Views:
    """Random views of the self-supervised objectives (see `ssnas.data.views.views`)."""

    min_area: float = _key(0.2, above=0.0, high=1.0)
    brightness: float = _key(0.4, low=0.0, high=1.0)
    contrast: float = _key(0.4, low=0.0, high=1.0)
    saturation: float = _key(0.2, low=0.0, high=1.0)
    hue: float = _key(0.1, low=0.0, high=0.5)
    jitter_probability: float = _key(0.8, low=0.0, high=1.0)
    grey_probability: float = _key(0.2, low=0.0, high=1.0)


@dataclass(frozen=True)
class Sgd:
    """The descent on ω and what it sees, for search and fine-tuning alike (T21, section 4).

    `sampling` draws the batches (see `ssnas.data.sampling`). Under `bilateral` the two branches are
    mixed by the schedule `mixing`, of steepness `steepness` (see `ssnas.networks.bilateral`).
    """

    epochs: int = _key(100, low=0)
    batch_size: int = _key(32, low=2)
    learning_rate: float = _key(0.025, above=0.0)
    min_learning_rate: float = _key(0.0, low=0.0)
    momentum: float = _key(0.9, low=0.0, high=1.0)
    weight_decay: float = _key(3e-4, low=0.0)
    gradient_clip: float = _key(5.0, above=0.0)
    crop_padding: float = _key(0.125, low=0.0, high=0.5)
    sampling: str = _key("instance", choices="ssnas.data.sampling:SAMPLERS")
    mixing: str = _key("parabolic", choices="ssnas.networks.bilateral:SCHEDULES")
    steepness: float = _key(10.0, above=0.0)


@dataclass(frozen=True)
class Search(Sgd):
    """The bilevel search (T21, sections 3 and 4).

    A search of no epochs leaves α as they are drawn: its genotype is a random one.
    """

    relaxation: str = _key("sigmoid", choices="ssnas.networks.operations:RELAXATIONS")
    objective: str = _key("barlow-twins", choices="ssnas.training.objectives:OBJECTIVES")
    channels: int = _key(16, low=2)
    cells: int = _key(3, low=3)
    stem_multiplier: int = _key(3, low=1)
    stem: str = _key("cifar", choices="ssnas.networks.backbone:STEMS")
    partial: int = _key(1, low=1)
    checkpoint: bool = False
    omega_share: float = _key(0.5, above=0.0, high=0.9)
    second_order: bool = False
    heterogeneous: bool = False
    alpha_learning_rate: float = _key(3e-4, above=0.0)
    alpha_weight_decay: float = _key(1e-3, low=0.0)
    zero_one_norm: str = _key("l2", choices="ssnas.losses:ZERO_ONE_NORMS")
    zero_one_weight: float = _key(10.0, low=0.0)
    projector: int = _key(512, low=2)
    loss_scale: float = _key(0.024, above=0.0)
    lambd: float = _key(0.005, low=0.0)
    temperature: float = _key(0.5, above=0.0)
    knn_every: int = _key(1, low=0)


@dataclass(frozen=True)
class Derive:
    """The derivation rule, see `ssnas.networks.genotype.derive`.

    `op` is the operation of the rule `uniform`.
    """

    rule: str = _key("argmax", choices="ssnas.networks.genotype:RULES")
    threshold: float = _key(0.85, low=0.0, high=1.0)
    op: str = _key("sep_conv_3x3", choices="ssnas.networks.operations:kept_operations")


@dataclass(frozen=True)
class Finetune(Sgd):
    """Supervised training of a network.

    `network` is the one of the derived genotype, the searched supernet itself (H24), or a
    baseline. `cells` and `channels` stack the derived cells to another size than the searched one;
    `pretrain_epochs` train it with the search's self-supervised objective first (SSNAS).
    """

    epochs: int = _key(600, low=0)
    network: str = _key("derived", choices="ssnas.networks.factory:NETWORKS")
    cells: int | None = _key(None, low=3)
    channels: int | None = _key(None, low=2)
    pretrain_epochs: int = _key(0, low=0)
    inherit: bool = True
    freeze_backbone: bool = False
    loss: str = _key("focal+la", choices="ssnas.losses:LOSSES")
    gamma: float = _key(2.0, low=0.0)
    tau: float = _key(1.0, low=0.0)
    early_stop: int = _key(0, low=0)


@dataclass(frozen=True)
class Transfer:
    """The data set that genotype and weights move to, and how they are trained there.

    A source without a published test set is cross-validated over `folds` stratified parts.
    """

    dataset: str = "faces"
    size: int | None = _key(None, low=8)
    channels: str = _key("keep", choices="ssnas.data.folders:CHANNELS")
    folds: int = _key(5, low=2)
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    bad_images: str = _key("error", choices="ssnas.data.folders:BAD_IMAGES")
    flip: bool | None = None
    weights: str = _key("search", choices=TRANSFER_WEIGHTS)
    loss: str = _key("focal+la", choices="ssnas.losses:LOSSES")
    epochs: int = _key(100, low=1)


SECTIONS: dict[str, type] = {
    "data": Data,
    "views": Views,
    "search": Search,
    "derive": Derive,
    "finetune": Finetune,
    "transfer": Transfer,
}
SCALED = ("data", "search", "finetune", "transfer")
TOP_LEVEL = ("dataset", "loss", "seed", "scale", "device")


@dataclass(frozen=True)
class Run:
    """Everything that one run of the pipeline reads.

    `folders` names, for the data set, the search, the row and the transfer, the place of its
    files below data/, artifacts/ and metrics/; rows may share a search, and searches a data set.
    `seeds` has the seed of each of them.
    """

    folders: Mapping[str, str]
    scale: str
    seeds: Mapping[str, int]
    device: str
    data: Data = Data()
    views: Views = Views()
    search: Search = Search()
    derive: Derive = Derive()
    finetune: Finetune = Finetune()
    transfer: Transfer = Transfer()


def build(section: type, where: str, *layers: Mapping[str, Any]) -> Any:
    """An instance of `section` from its defaults and `layers`, the last layer winning.

    Args:
        where: how messages name the section, for instance `params.yaml: search`.

    Raises:
        InputError: naming an unknown key, or a value of the wrong type or outside its limits,
            and what is accepted.
    """
    hints = typing.get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section)}
    values = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in fields:
                raise InputError(
                    f"{where}.{key}: unknown key; the keys of {section.__name__.lower()} are "
                    f"{', '.join(fields)}"
                )
            values[key] = checked(f"{where}.{key}", value, hints[key], fields[key].metadata)
    return section(**values)


def checked(where: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    optional = isinstance(hint, types.UnionType)
    kinds = typing.get_args(hint) if optional else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 3e-4, without a point, as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        accepted = names[kind] + (" or null" if optional else "")
        raise InputError(f"{where}: found {value!r}; accepted is {accepted}")
    if "choices" in limits:
        choices = choices_of(limits["choices"])
        if value not in choices:
            raise InputError(f"{where}: found {value!r}; choose from {', '.join(choices)}")
    if kind in (int, float):
        _check_range(where, value, limits)
    return value


def choices_of(declared: Iterable[str] | str) -> tuple[str, ...]:
    """Resolve the `choices` of a key: the values themselves, or those of `module:name`."""
    if not isinstance(declared, str):
        return tuple(declared)
    module, _, name = declared.partition(":")
    table = getattr(importlib.import_module(module), name)
    return tuple(table() if callable(table) else table)


def _check_range(where: str, value: float, limits: Mapping[str, Any]) -> None:
    bounds = [
        ("low", "at least", lambda bound: value >= bound),
        ("above", "more than", lambda bound: value > bound),
        ("high", "at most", lambda bound: value <= bound),
    ]
    holds = [(word, limits[name], test) for name, word, test in bounds if name in limits]
    if not math.isfinite(value) or not all(test(bound) for _, bound, test in holds):
        accepted = " and ".join(f"{word} {bound:g}" for word, bound, _ in holds) or "finite numbers"
        raise InputError(f"{where}: found {value!r}; accepted is {accepted}")
