"""Expand papers/systems.yaml, one entry a system, to papers/rows.yaml, one a scale and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssnas.config.load import BUILDS_ON, SECTIONS_OF
from ssnas.errors import InputError

SYSTEMS = Path("papers/systems.yaml")


def expand(
    systems: Mapping[str, Any], scales: Sequence[str], path: Path = SYSTEMS
) -> dict[str, dict[str, Any]]:
    """Expand each system to an entry of rows.yaml for each scale and seed.

    An entry is named after its system, with `-seed<n>` behind it for n > 0. It refers to the
    entry of the same seed where the other system has one, else to that of seed 0. A system's
    `seeds` counts them at scale `small`; at another scale there is one, unless the system's keys
    for that scale say more.

    Args:
        systems: the systems by kind and name, as in papers/systems.yaml.
        scales: the scales of params.yaml.
        path: the file that messages name.

    Returns:
        The entries by kind and key.

    Raises:
        InputError: for an unknown kind, or a reference to a system that is not there.

    Example:
        >>> systems = {"datasets": {"toy": {"dataset": "digits", "paper": {"size": 32}}}}
        >>> for key, entry in expand(systems, ["small", "paper"])["datasets"].items():
        ...     print(key, entry["dataset"], entry.get("size"))
        small-toy digits None
        paper-toy digits 32
    """
    entries: dict[str, dict[str, Any]] = {}
    for kind, named in systems.items():
        if kind not in SECTIONS_OF:
            raise InputError(f"{path}: {kind}: unknown kind; choose from {', '.join(SECTIONS_OF)}")
        entries[kind] = {}
        for name, system in (named or {}).items():
            for scale in scales:
                for seed in range(_seeds(system, scale)):
                    entry = _expanded(systems, kind, name, scale, seed, path, scales)
                    entries[kind][f"{scale}-{entry['name']}"] = entry
    return entries


def _seeds(system: Mapping[str, Any], scale: str) -> int:
    seeds: int = system.get("seeds", 1) if scale == "small" else 1
    return system.get(scale, {}).get("seeds") or seeds


def _expanded(
    systems: Mapping[str, Any],
    kind: str,
    name: str,
    scale: str,
    seed: int,
    path: Path,
    scales: Sequence[str],
) -> dict[str, Any]:
    system = systems[kind][name]
    settings = {**system, **system.get(scale, {})}
    reference = BUILDS_ON.get(kind)
    if reference is not None:
        others = systems.get(reference.kind) or {}
        other = settings.get(reference.key)
        if not isinstance(other, str) or other not in others:
            raise InputError(
                f"{path}: {kind}.{name}.{reference.key}: found {other!r}; choose from "
                f"{', '.join(others)}"
            )
        settings[reference.key] = _named(other, seed, _seeds(others[other], scale))
    structure = {"name": _named(name, seed), "system": name, "scale": scale, "seed": seed}
    return structure | {
        key: value for key, value in settings.items() if key not in (*scales, "seeds")
    }


def _named(system: str, seed: int, seeds: int | None = None) -> str:
    """Name the entry of a seed, or that of seed 0 if the system has fewer `seeds`."""
    return f"{system}-seed{seed}" if 0 < seed < (seeds or seed + 1) else system
