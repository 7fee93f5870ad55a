"""Read the parameters of a run from its files.

A run's parameters come from three layers, later ones winning: the defaults of `schema`, the preset
of its scale (`scales` in params.yaml), and the keys set for the run itself: in params.yaml for the
main run, in papers/rows.yaml for the rows of the papers' tables.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ssnas.config.schema import SCALED, SECTIONS, TOP_LEVEL, Run, build, checked, choices_of
from ssnas.errors import InputError

PARAMS = Path("params.yaml")
ROWS = Path("papers/rows.yaml")


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
        checked(f"{path}: device", document.get("device", "auto"), str, {}),
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
    return checked(f"{where}: seed", entry.get("seed", 0), int, {"low": 0, "high": 2**31 - 1})


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
        reference = REFERENCE.get(group, (None, None))[1]
        structure = ("name", "system", "scale", "seed", reference)
        given = {k: v for k, v in link.entry.items() if k not in structure}
        for section in OWNED[group]:
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
        checked(f"{params_path}: device", params.get("device", "auto"), str, {}),
        **sections,
    )


def _check_without_search(kind: str, where: str, sections: Mapping[str, Any]) -> None:
    """An entry that builds on no search names a published network and starts from no weights."""
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


OWNED = {
    "datasets": ("data",),
    "searches": ("views", "search", "derive"),
    "rows": ("finetune",),
    "baselines": ("finetune",),
    "transfers": ("transfer",),
    "crossvalidations": ("transfer", "finetune"),
}
REFERENCE = {
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


def _chain(document: Mapping[str, Any], kind: str, key: str, path: Path) -> typing.Iterator[_Link]:
    """The entry and those that it builds on, down to its data set, all of one scale."""
    entries = document.get(kind) or {}
    if key not in entries:
        raise InputError(f"{path}: {kind}.{key}: not there; choose from {', '.join(entries)}")
    entry, where = entries[key], f"{path}: {kind}.{key}"
    below, reference = REFERENCE.get(kind, (None, None))
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
