"""Read the parameters of a run from its files.

A run's parameters come from four layers, later ones winning: the defaults of `schema`, the preset
of its scale (`scales` in params.yaml), its recipe (`recipes`), and the keys set for the run itself:
in params.yaml for the main run, in papers/rows.yaml for the rows of the papers' tables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssnas.config.decide import MULTI_LABEL_DECISIONS
from ssnas.config.recipes import RECIPES
from ssnas.config.schema import (
    SCALED,
    SECTIONS,
    TOP_LEVEL,
    Run,
    build,
    check_key,
    check_value,
    choices_of,
)
from ssnas.errors import InputError, shown

PARAMS = Path("params.yaml")
ROWS = Path("papers/rows.yaml")
PRESETS = Path(__file__).with_name("presets.yaml")


class _DuplicateKey(Exception):
    """A key that stands twice in a mapping; `path` leads to it from the top of the file."""

    def __init__(self, key: str, lines: tuple[int, int]) -> None:
        self.path, self.lines = [key], lines

    def __str__(self) -> str:
        first, second = self.lines
        return (
            f"{'.'.join(self.path)}: found in lines {first} and {second}; accepted is one of them"
        )


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice, where YAML takes the last one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        try:
            return super().compose_node(parent, index)
        except _DuplicateKey as error:
            # `index` is the key of this node in a mapping, and its number in a sequence.
            if index is not None:
                error.path.insert(0, str(getattr(index, "value", index)))
            raise

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    raise _DuplicateKey(key.value, (lines[key.tag, key.value], line))
                lines[key.tag, key.value] = line
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        InputError: if the file is missing, is not YAML, holds something else, or has a key twice.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: not found; run the command from the project's top folder"
        ) from error
    except _DuplicateKey as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: found {type(document).__name__}; accepted is a mapping")
    return document


def load_main(path: Path = PARAMS) -> Run:
    """Load the main run, the top level of params.yaml.

    Raises:
        InputError: for a wrong key or value; it names the file and the key as the user wrote it.
    """
    return _run(read_yaml(path), str(path), "main")


def load_options(options: Mapping[str, Any], path: Path | None, root: Path) -> Run:
    """Load the run of `ssnas.fit`, whose files are below `root`.

    Args:
        options: by key of the top level of params.yaml; also keys of its section `data`.
        path: of a file like params.yaml; None for the presets, and classes as frequent as they are.
        root: where the run's files go.

    Raises:
        InputError: for a wrong key or value.

    Example:
        >>> run = load_options({"dataset": "photos", "size": 64, "loss": "ce"}, None, Path("runs"))
        >>> run.data.size, run.data.profile, run.finetune.loss, run.search.epochs
        (64, 'natural', 'ce', 0)
    """
    document = read_yaml(path or PRESETS)
    if path is None:
        document = {**document, "recipe": "short", "data": {"profile": "natural"}}
    where = "options" if path is None else f"{path} and options"
    in_data = [field.name for field in dataclasses.fields(SECTIONS["data"])]
    chosen = _with_search_named(options, path is None, where)
    for key, value in chosen.items():
        if key in in_data and key not in TOP_LEVEL:
            document["data"] = {**_mapping(document.get("data", {}), f"{where}: data"), key: value}
        elif key in SECTIONS and isinstance(value, Mapping):
            section = _mapping(document.get(key, {}), f"{where}: {key}")
            document[key] = {**section, **value}
        elif key in (*TOP_LEVEL, *SECTIONS):
            document[key] = value
        else:
            known = (*TOP_LEVEL, *in_data[1:], *SECTIONS)
            raise InputError(f"{where}: {key}: unknown key; choose from {', '.join(known)}")
    return dataclasses.replace(_run(document, where, "."), root=root)


def _with_search_named(options: Mapping[str, Any], by_default: bool, where: str) -> dict[str, Any]:
    """Turn `search` by its name into sections: `none`, for a fixed genotype, or an objective.

    By default there is no search, unless the section `search` is given with epochs.
    """
    named = options.get("search")
    sections = dict(options)
    if isinstance(named, str):
        del sections["search"]
    elif by_default and not (isinstance(named, Mapping) and named.get("epochs")):
        named = "none"
    else:
        return sections
    choices = ("none", *choices_of("ssnas.training.objectives:OBJECTIVES"))
    check_value(named, f"{where}: search", str, {"choices": choices})
    keys = WITHOUT_SEARCH if named == "none" else {"search": {"objective": named}}
    for section, values in keys.items():
        more = sections.get(section, {})
        sections[section] = {**values, **more} if isinstance(more, Mapping) else more
    return sections


WITHOUT_SEARCH: dict[str, dict[str, Any]] = {
    "search": {"epochs": 0},
    "derive": {"rule": "fixed"},
    "finetune": {"inherit": False},
}
"""What trains a fixed genotype from scratch."""


def _run(document: Mapping[str, Any], where: str, folder: str) -> Run:
    known = (*TOP_LEVEL, *SECTIONS, "scales")
    for key in document:
        if key not in known:
            raise InputError(f"{where}: {key}: unknown key; choose from {', '.join(known)}")
    scale = document.get("scale", "small")
    preset = _preset(document, scale, where, f"{where}: scale")
    set_here = {name: _mapping(document.get(name, {}), f"{where}: {name}") for name in SECTIONS}
    sections = {
        name: build(
            section,
            f"{where}: {name}",
            preset.get(name, {}),
            _recipe(document, set_here, name, where),
            _routed(document, name, where),
            set_here[name],
        )
        for name, section in SECTIONS.items()
    }
    return Run(
        dict.fromkeys(_STEPS, folder),
        scale,
        dict.fromkeys(_STEPS, _seed(document, f"{where}: seed")),
        _device(document.get("device", "auto"), f"{where}: device"),
        decide=_decide(document.get("decide", "balanced"), f"{where}: decide"),
        **sections,
    )


def _recipe(
    document: Mapping[str, Any], set_here: Mapping[str, Mapping[str, Any]], name: str, where: str
) -> dict[str, Any]:
    """Look up what the recipe of the run, or of a section of its own, sets in a section."""
    follows = _RECIPE_OF.get(name, name)
    at_top, where = document.get("recipe", "published"), f"{where}: recipe"
    if follows in ("search", "finetune") and "recipe" in set_here[follows]:
        at_top, where = set_here[follows]["recipe"], where.replace("recipe", f"{follows}.recipe")
    return _keys_of_recipe(at_top, name, where)


_RECIPE_OF = {"views": "search", "transfer": "finetune"}
"""The sections whose recipe is that of another one."""


def _keys_of_recipe(recipe: Any, section: str, where: str) -> dict[str, Any]:
    """Give the keys of a section that a recipe sets, with its name where the section has one."""
    check_value(recipe, where, str, {"choices": RECIPES})
    named = {"recipe": recipe} if section in ("search", "finetune") else {}
    return {**named, **RECIPES[recipe].get(section, {})}


def _device(value: Any, where: str) -> str:
    device: str = check_value(value, where, str)
    if device.partition(":")[0] == "meta":
        raise InputError(f"{where}: found {device!r}, which computes nothing; accepted is auto")
    return device


def _decide(value: Any, where: str) -> str | dict[str, float]:
    """Check a decision by name, or the frequencies of classes."""
    if not isinstance(value, dict):
        limits = {"choices": MULTI_LABEL_DECISIONS}
        name: str = check_value(value, where, str, limits)
        return name
    return {
        str(name): check_value(share, f"{where}.{name}", float, {"low": 0.0, "high": 1.0})
        for name, share in value.items()
    }


_STEPS = ("datasets", "searches", "rows", "transfers")
_ROUTES = {"dataset": ("data",), "loss": ("finetune", "transfer")}
"""Keys of the top level, each with the sections whose key of the same name it sets."""


def _routed(document: Mapping[str, Any], section: str, path: str) -> dict[str, Any]:
    """Collect what the top level sets in a section."""
    return {
        key: check_key(SECTIONS[section], key, document[key], f"{path}: {key}")
        for key, sections in _ROUTES.items()
        if section in sections and document.get(key) is not None
    }


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {shown(value)}; accepted is a mapping")
    return value


def _preset(params: Mapping[str, Any], scale: Any, path: str, where: str) -> dict[str, Any]:
    """Look up the sections that a scale presets in params.yaml; `where` is the key of the scale."""
    scales = _mapping(params.get("scales"), f"{path}: scales")
    if scale not in list(scales):
        raise InputError(
            f"{where}: found {shown(scale)}; choose from {', '.join(map(str, scales))}"
        )
    preset = _mapping(scales[scale], f"{path}: scales.{scale}")
    for section, values in preset.items():
        if section not in SCALED or not isinstance(values, dict):
            raise InputError(
                f"{path}: scales.{scale}.{section}: choose from {', '.join(SCALED)}, each a mapping"
            )
        build(SECTIONS[section], f"{path}: scales.{scale}.{section}", values)
    return preset


def _seed(entry: Mapping[str, Any], where: str) -> int:
    seed: int = check_value(entry.get("seed", 0), where, int, {"low": 0, "high": 2**31 - 1})
    return seed


class Reference(NamedTuple):
    """The entry that another one builds on: its kind, and the key that has its name."""

    kind: str
    key: str


BUILDS_ON = {
    "searches": Reference("datasets", "dataset"),
    "rows": Reference("searches", "search"),
    "baselines": Reference("datasets", "dataset"),
    "transfers": Reference("rows", "row"),
}
"""The links between entries by kind; the other kinds build on none."""

SECTIONS_OF = {
    "datasets": ("data",),
    "searches": ("views", "search", "derive"),
    "rows": ("finetune",),
    "baselines": ("finetune",),
    "transfers": ("transfer",),
    "crossvalidations": ("transfer", "finetune"),
}
"""The sections whose keys an entry of each kind sets."""

_ROLE = {"baselines": "rows", "crossvalidations": "transfers"}
"""Kinds that the stages treat as another one: they lack the links below, and nothing else."""


class _Link(NamedTuple):
    """An entry of rows.yaml, and how messages name it."""

    kind: str
    where: str
    entry: dict[str, Any]


def load_row(kind: str, key: str, rows_path: Path = ROWS, params_path: Path = PARAMS) -> Run:
    """Load the run of a paper row, as far as the entry determines it.

    Args:
        kind: a key of `SECTIONS_OF`, such as `searches`.
        key: the entry's key in papers/rows.yaml.
        rows_path: the file of the entries.
        params_path: the file of the scales and the device.

    Raises:
        InputError: for an unknown key, a reference to an entry that is not there, or a wrong
            value.
    """
    document, params = read_yaml(rows_path), read_yaml(params_path)
    chain = {link.kind: link for link in _chain(document, kind, key, rows_path)}
    scale = chain[kind].entry["scale"]
    preset = _preset(params, scale, str(params_path), f"{chain[kind].where}.scale")
    sections: dict[str, Any] = {}
    for link in chain.values():
        sections |= _sections(link, preset)
    if kind in _ROLE:
        _check_without_search(kind, chain[kind].where, sections)
    return Run(
        {
            _ROLE.get(group, group): f"papers/{scale}/{group}/{link.entry['name']}"
            for group, link in chain.items()
        },
        scale,
        {
            _ROLE.get(group, group): _seed(link.entry, f"{link.where}.seed")
            for group, link in chain.items()
        },
        _device(params.get("device", "auto"), f"{params_path}: device"),
        **sections,
    )


def _chain(document: Mapping[str, Any], kind: str, key: str, path: Path) -> Iterator[_Link]:
    """Yield the entry and those that it builds on, down to its data set, all of one scale."""
    entries = _mapping(document.get(kind) or {}, f"{path}: {kind}")
    if key not in entries:
        raise InputError(f"{path}: {kind}.{key}: not there; choose from {', '.join(entries)}")
    where = f"{path}: {kind}.{key}"
    entry = _mapping(entries[key], where)
    reference = BUILDS_ON.get(kind)
    for required in ("name", "scale", *([reference.key] if reference else [])):
        if required not in entry:
            raise InputError(f"{where}: the key {required!r} is missing")
    for path_part in ("name", "scale"):
        _check_name(entry[path_part], f"{where}.{path_part}")
    yield _Link(kind, where, entry)
    if reference is None:
        return
    below = _mapping(document.get(reference.kind) or {}, f"{path}: {reference.kind}")
    for other, candidate in below.items():
        candidate = _mapping(candidate, f"{path}: {reference.kind}.{other}")
        names = (candidate.get("name"), candidate.get("scale"))
        if names == (entry[reference.key], entry["scale"]):
            yield from _chain(document, reference.kind, other, path)
            return
    raise InputError(
        f"{where}.{reference.key}: no {reference.kind} entry is named {entry[reference.key]!r} at "
        f"scale {entry['scale']!r}"
    )


def _check_name(value: Any, where: str) -> None:
    """Check a name that becomes a folder.

    Raises:
        InputError: for what is no text, or could lead elsewhere.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", value):
        raise InputError(
            f"{where}: found {shown(value)}; accepted is a name of letters, digits and . _ + -"
        )


def _sections(link: _Link, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Build the sections that an entry sets."""
    keys = {
        name: [field.name for field in dataclasses.fields(SECTIONS[name])]
        for name in SECTIONS_OF[link.kind]
    }
    reference = BUILDS_ON.get(link.kind)
    structure = ["name", "system", "scale", "seed", *([reference.key] if reference else [])]
    known = [*structure, *(key for fields in keys.values() for key in fields)]
    for key in link.entry:
        if key not in known:
            raise InputError(f"{link.where}.{key}: unknown key; choose from {', '.join(known)}")
    settings = {key: value for key, value in link.entry.items() if key not in structure}
    sections = {}
    for name, fields in keys.items():
        layer = {key: settings.pop(key) for key in fields if key in settings}
        recipe = link.entry.get("recipe", "published")
        by_recipe = _keys_of_recipe(recipe, name, f"{link.where}.recipe")
        sections[name] = build(SECTIONS[name], link.where, preset.get(name, {}), by_recipe, layer)
    return sections


def _check_without_search(kind: str, where: str, sections: Mapping[str, Any]) -> None:
    """Check that an entry without a search names a published network and reads no weights."""
    published = choices_of("ssnas.networks.baselines:BASELINES")
    if sections["finetune"].network not in published:
        raise InputError(
            f"{where}.network: found {sections['finetune'].network!r}, which needs a search; "
            f"choose from {', '.join(published)}"
        )
    if kind == "crossvalidations" and sections["transfer"].weights != "none":
        raise InputError(
            f"{where}.weights: found {sections['transfer'].weights!r}; accepted is none, since "
            "there is no row to take weights from"
        )
