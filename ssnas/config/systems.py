"""Expand papers/systems.yaml, one entry a system, to papers/rows.yaml, one a scale and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssnas.config.load import OWNED, REFERENCE
from ssnas.errors import InputError

SYSTEMS = Path("papers/systems.yaml")


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
        if kind not in OWNED:
            raise InputError(f"{path}: {kind}: unknown kind; choose from {', '.join(OWNED)}")
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
    keys = {**systems[kind][name], **systems[kind][name].get(scale, {})}
    below, reference = REFERENCE.get(kind, (None, None))
    if below and reference:
        needed = keys.get(reference)
        if needed not in (systems.get(below) or {}):
            raise InputError(
                f"{path}: {kind}.{name}.{reference}: found {needed!r}; choose from "
                f"{', '.join(systems.get(below) or {})}"
            )
        keys[reference] = _named(str(needed), seed, _seeds(systems[below][needed], scale))
    settings = {key: value for key, value in keys.items() if key not in (*scales, "seeds")}
    return {"name": _named(name, seed), "system": name, "scale": scale, "seed": seed} | settings


def _named(system: str, seed: int, seeds: int | None = None) -> str:
    return f"{system}-seed{seed}" if 0 < seed < (seeds or seed + 1) else system
