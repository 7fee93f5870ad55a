"""Parameters as typed, validated, frozen objects.

A run's parameters come from three layers, later ones winning: the defaults below, which are the
papers', the preset of its scale (`scales` in params.yaml), and the keys set for the run itself:
in params.yaml for the main run, in papers/rows.yaml for the rows of the papers' tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssnas.errors import InputError
from ssnas.space import OPS

PARAMS = Path("params.yaml")
ROWS = Path("papers/rows.yaml")
SYSTEMS = Path("papers/systems.yaml")

OBJECTIVES = ("barlow-twins", "nt-xent", "supervised")
SAMPLINGS = ("instance", "balanced", "bilateral")
MIXINGS = ("parabolic", "reverse-sigmoid", "constant", "class-head")
STEMS = ("cifar", "imagenet")
BASELINES = ("resnet-18", "resnet-32", "resnet-34", "resnet-50", "darkcovidnet")
LOSSES = ("ce", "ce+la", "focal", "focal+la", "ldam-drw", "sigmoid", "balanced-sigmoid")
TRANSFER_WEIGHTS = ("search", "finetune", "none")


def _key(default: Any, **limits: Any) -> Any:
    """A field with its limits: `choices`, `low` (≥), `above` (>), `high` (≤)."""
    return dataclasses.field(default=default, metadata=limits)


@dataclass(frozen=True)
class Data:
    """Images and how they become a long-tailed split (see `ssnas.datasets.split`)."""

    dataset: str = "digits"
    size: int | None = _key(None, low=8)
    channels: str = _key("keep", choices=("keep", "grey", "rgb"))
    profile: str = _key(
        "exponential", choices=("natural", "exponential", "power", "step", "balanced")
    )
    imbalance: float = _key(10.0, low=1.0)
    largest_class: int | None = _key(None, low=1)
    max_images: int | None = _key(None, low=2)
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    test_fraction: float = _key(0.2, above=0.0, high=0.5)
    bad_images: str = _key("error", choices=("error", "skip"))
    flip: bool | None = None


@dataclass(frozen=True)
class Views:
    """Random views of the self-supervised objectives (see `ssnas.augment.views`)."""

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

    `sampling` draws the batches (see `ssnas.sampling`). Under `bilateral` the two branches are
    mixed by the schedule `mixing`, of steepness `steepness` (see `ssnas.bilateral`).
    """

    epochs: int = _key(100, low=0)
    batch_size: int = _key(32, low=2)
    learning_rate: float = _key(0.025, above=0.0)
    min_learning_rate: float = _key(0.0, low=0.0)
    momentum: float = _key(0.9, low=0.0, high=1.0)
    weight_decay: float = _key(3e-4, low=0.0)
    gradient_clip: float = _key(5.0, above=0.0)
    crop_padding: float = _key(0.125, low=0.0, high=0.5)
    sampling: str = _key("instance", choices=SAMPLINGS)
    mixing: str = _key("parabolic", choices=MIXINGS)
    steepness: float = _key(10.0, above=0.0)


@dataclass(frozen=True)
class Search(Sgd):
    """The bilevel search (T21, sections 3 and 4).

    A search of no epochs leaves α as they are drawn: its genotype is a random one.
    """

    relaxation: str = _key("sigmoid", choices=("sigmoid", "softmax"))
    objective: str = _key("barlow-twins", choices=OBJECTIVES)
    channels: int = _key(16, low=2)
    cells: int = _key(3, low=3)
    stem_multiplier: int = _key(3, low=1)
    stem: str = _key("cifar", choices=STEMS)
    partial: int = _key(1, low=1)
    checkpoint: bool = False
    omega_share: float = _key(0.5, above=0.0, high=0.9)
    second_order: bool = False
    heterogeneous: bool = False
    alpha_learning_rate: float = _key(3e-4, above=0.0)
    alpha_weight_decay: float = _key(1e-3, low=0.0)
    zero_one_norm: str = _key("l2", choices=("l2", "l1"))
    zero_one_weight: float = _key(10.0, low=0.0)
    projector: int = _key(512, low=2)
    loss_scale: float = _key(0.024, above=0.0)
    lambd: float = _key(0.005, low=0.0)
    temperature: float = _key(0.5, above=0.0)
    knn_every: int = _key(1, low=0)


@dataclass(frozen=True)
class Derive:
    """The derivation rule (see `ssnas.genotype.derive`); `op` is that of the rule `uniform`."""

    rule: str = _key("argmax", choices=("argmax", "darts", "threshold", "uniform"))
    threshold: float = _key(0.85, low=0.0, high=1.0)
    op: str = _key("sep_conv_3x3", choices=OPS[1:])


@dataclass(frozen=True)
class Finetune(Sgd):
    """Supervised training of a network.

    `network` is the one of the derived genotype, the searched supernet itself (H24), or a
    baseline. `cells` and `channels` stack the derived cells to another size than the searched one;
    `pretrain_epochs` train it with the search's self-supervised objective first (SSNAS).
    """

    epochs: int = _key(600, low=0)
    network: str = _key("derived", choices=("derived", "supernet", *BASELINES))
    cells: int | None = _key(None, low=3)
    channels: int | None = _key(None, low=2)
    pretrain_epochs: int = _key(0, low=0)
    inherit: bool = True
    freeze_backbone: bool = False
    loss: str = _key("focal+la", choices=LOSSES)
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
    channels: str = _key("keep", choices=("keep", "grey", "rgb"))
    folds: int = _key(5, low=2)
    val_fraction: float = _key(0.1, above=0.0, high=0.5)
    bad_images: str = _key("error", choices=("error", "skip"))
    flip: bool | None = None
    weights: str = _key("search", choices=TRANSFER_WEIGHTS)
    loss: str = _key("focal+la", choices=LOSSES)
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
            values[key] = _checked(f"{where}.{key}", value, hints[key], fields[key].metadata)
    return section(**values)


def _checked(where: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
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
    if "choices" in limits and value not in limits["choices"]:
        raise InputError(f"{where}: found {value!r}; choose from {', '.join(limits['choices'])}")
    if kind in (int, float):
        _check_range(where, value, limits)
    return value


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: if the file is missing, is not YAML, or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: not found; run the command from the project's top folder"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: found {type(document).__name__}; accepted is a mapping")
    return document


def load_main(path: Path = PARAMS) -> Run:
    """The main run: the top level of params.yaml.

    Raises:
        InputError: for a wrong key or value, see `build`.
    """
    document = read_yaml(path)
    known = (*TOP_LEVEL, *SECTIONS, "scales")
    for key in document:
        if key not in known:
            raise InputError(f"{path}: {key}: unknown key; choose from {', '.join(known)}")
    for key in SECTIONS:
        if not isinstance(document.get(key, {}), dict):
            raise InputError(f"{path}: {key}: found {document[key]!r}; accepted is a mapping")
    scale, preset = _scale(document, document.get("scale", "small"), path)
    routed = {
        "data": _pick(document, dataset="dataset"),
        "finetune": _pick(document, loss="loss"),
        "transfer": _pick(document, loss="loss"),
    }
    sections = {
        name: build(
            section,
            f"{path}: {name}",
            preset.get(name, {}),
            routed.get(name, {}),
            document.get(name, {}),
        )
        for name, section in SECTIONS.items()
    }
    return Run(
        dict.fromkeys(_STEPS, "main"),
        scale,
        dict.fromkeys(_STEPS, _seed(document, path)),
        _checked(f"{path}: device", document.get("device", "auto"), str, {}),
        **sections,
    )


_STEPS = ("datasets", "searches", "rows", "transfers")


def _pick(document: Mapping[str, Any], **routes: str) -> dict[str, Any]:
    return {key: document[source] for key, source in routes.items() if source in document}


def _scale(document: Mapping[str, Any], name: Any, path: Path) -> tuple[str, dict[str, Any]]:
    scales = document.get("scales")
    if not isinstance(scales, dict):
        raise InputError(f"{path}: scales: found {scales!r}; accepted is a mapping of scales")
    if name not in scales:
        raise InputError(f"{path}: scale: found {name!r}; choose from {', '.join(scales)}")
    preset = scales[name]
    if not isinstance(preset, dict):
        raise InputError(f"{path}: scales.{name}: found {preset!r}; accepted is a mapping")
    for section, values in preset.items():
        if section not in SCALED or not isinstance(values, dict):
            raise InputError(
                f"{path}: scales.{name}.{section}: choose from {', '.join(SCALED)}, each a mapping"
            )
        build(SECTIONS[section], f"{path}: scales.{name}.{section}", values)
    return name, preset


def _seed(entry: Mapping[str, Any], where: Path | str) -> int:
    return _checked(f"{where}: seed", entry.get("seed", 0), int, {"low": 0, "high": 2**31 - 1})


def load_row(kind: str, key: str, rows_path: Path = ROWS, params_path: Path = PARAMS) -> Run:
    """The run of a paper row, as far as the entry determines it.

    Args:
        kind: `datasets`, `searches`, `rows`, `baselines`, `transfers` or `crossvalidations`.
        key: the entry's key in papers/rows.yaml.

    Raises:
        InputError: for an unknown key, a reference to an entry that is not there, or a wrong
            value.
    """
    document, params = read_yaml(rows_path), read_yaml(params_path)
    chain = {link.kind: link for link in _chain(document, kind, key, rows_path)}
    scale, preset = _scale(params, chain[kind].entry["scale"], params_path)
    sections = {}
    for group, link in chain.items():
        reference = _REFERENCE.get(group, (None, None))[1]
        structure = ("name", "system", "scale", "seed", reference)
        given = {k: v for k, v in link.entry.items() if k not in structure}
        for section in _OWNED[group]:
            own = {f.name for f in dataclasses.fields(SECTIONS[section])}
            layer = {k: given.pop(k) for k in list(given) if k in own}
            sections[section] = build(SECTIONS[section], link.where, preset.get(section, {}), layer)
        if given:
            raise InputError(f"{link.where}: unknown key(s) {', '.join(given)}")
    if kind in _ROLE:
        _check_without_search(kind, chain[kind].where, sections)
    return Run(
        {
            _ROLE.get(group, group): f"papers/{scale}/{group}/{link.entry['name']}"
            for group, link in chain.items()
        },
        scale,
        {_ROLE.get(group, group): _seed(link.entry, link.where) for group, link in chain.items()},
        _checked(f"{params_path}: device", params.get("device", "auto"), str, {}),
        **sections,
    )


def _check_without_search(kind: str, where: str, sections: Mapping[str, Any]) -> None:
    """An entry that builds on no search names a published network and starts from no weights."""
    if sections["finetune"].network not in BASELINES:
        raise InputError(
            f"{where}.network: found {sections['finetune'].network!r}, which needs a search; "
            f"choose from {', '.join(BASELINES)}"
        )
    if kind == "crossvalidations" and sections["transfer"].weights != "none":
        raise InputError(
            f"{where}.weights: found {sections['transfer'].weights!r}; accepted is none, since "
            "there is no row to take weights from"
        )


_OWNED = {
    "datasets": ("data",),
    "searches": ("views", "search", "derive"),
    "rows": ("finetune",),
    "baselines": ("finetune",),
    "transfers": ("transfer",),
    "crossvalidations": ("transfer", "finetune"),
}
_REFERENCE = {
    "searches": ("datasets", "dataset"),
    "rows": ("searches", "search"),
    "baselines": ("datasets", "dataset"),
    "transfers": ("rows", "row"),
}
_ROLE = {"baselines": "rows", "crossvalidations": "transfers"}
"""Kinds that the stages treat as another one: they lack the links below, and nothing else."""


class _Link(typing.NamedTuple):
    """An entry of rows.yaml, and how messages name it."""

    kind: str
    where: str
    entry: dict[str, Any]


def expand(
    systems: Mapping[str, Any], scales: list[str], path: Path = SYSTEMS
) -> dict[str, dict[str, Any]]:
    """The entries of rows.yaml: each system at each scale, with each of its seeds.

    An entry is named after its system, with `-seed<n>` behind it for n > 0, and refers to the
    entry of the same seed where that has one, else to that of seed 0. `seeds` counts them at scale
    `small`; at another scale there is one, unless the system's own keys for it say more.

    Raises:
        InputError: for an unknown kind, or a reference to a system that is not there.
    """
    entries: dict[str, dict[str, Any]] = {}
    for kind, named in systems.items():
        if kind not in _OWNED:
            raise InputError(f"{path}: {kind}: unknown kind; choose from {', '.join(_OWNED)}")
        entries[kind] = {}
        for name, system in (named or {}).items():
            for scale in scales:
                for seed in range(_seeds(system, scale)):
                    entry = _expanded(systems, kind, name, scale, seed, path, scales)
                    entries[kind][f"{scale}-{entry['name']}"] = entry
    return entries


def _seeds(system: Mapping[str, Any], scale: str) -> int:
    counted = system.get(scale, {}).get("seeds")
    return counted or (system.get("seeds", 1) if scale == "small" else 1)


def _expanded(
    systems: Mapping[str, Any],
    kind: str,
    name: str,
    scale: str,
    seed: int,
    path: Path,
    scales: list[str],
) -> dict[str, Any]:
    given = {**systems[kind][name], **systems[kind][name].get(scale, {})}
    below, reference = _REFERENCE.get(kind, (None, None))
    if below:
        needed = given.get(reference)
        if needed not in (systems.get(below) or {}):
            raise InputError(
                f"{path}: {kind}.{name}.{reference}: found {needed!r}; choose from "
                f"{', '.join(systems.get(below) or {})}"
            )
        given[reference] = _named(needed, seed, _seeds(systems[below][needed], scale))
    own = {key: value for key, value in given.items() if key not in (*scales, "seeds")}
    return {"name": _named(name, seed), "system": name, "scale": scale, "seed": seed} | own


def _named(system: str, seed: int, seeds: int | None = None) -> str:
    return f"{system}-seed{seed}" if 0 < seed < (seeds or seed + 1) else system


def _chain(document: Mapping[str, Any], kind: str, key: str, path: Path) -> typing.Iterator[_Link]:
    """The entry and those that it builds on, down to its data set, all of one scale."""
    entries = document.get(kind) or {}
    if key not in entries:
        raise InputError(f"{path}: {kind}.{key}: not there; choose from {', '.join(entries)}")
    entry, where = entries[key], f"{path}: {kind}.{key}"
    below, reference = _REFERENCE.get(kind, (None, None))
    for needed in ("name", "scale", reference):
        if needed and needed not in entry:
            raise InputError(f"{where}: the key {needed!r} is missing")
    yield _Link(kind, where, entry)
    if not below:
        return
    for other, candidate in (document.get(below) or {}).items():
        found = candidate.get("name"), candidate.get("scale")
        if found == (entry[reference], entry["scale"]):
            yield from _chain(document, below, other, path)
            return
    raise InputError(
        f"{where}.{reference}: no {below} entry is named {entry[reference]!r} at scale "
        f"{entry['scale']!r}"
    )
