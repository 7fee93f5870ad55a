"""What a piece of work depends on, as JSON-able mappings, and how two of them differ."""

from __future__ import annotations

import re
from typing import Any


def differences(saved: Any, current: Any, where: str = "") -> list[str]:
    """Name what differs between two identities, a phrase each.

    Example:
        >>> differences({"seed": 0, "search": {"epochs": 2}}, {"seed": 1, "search": {"epochs": 2}})
        ['seed: 0 there, 1 here']
        >>> differences({"code": "0" * 64}, {"code": "1" * 64})
        ['other code']
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        lines = []
        for key in sorted({*saved, *current}):
            place = f"{where}.{key}".lstrip(".")
            lines += differences(saved.get(key), current.get(key), place)
        return lines
    if saved == current:
        return []
    if _is_digest(saved) or _is_digest(current):
        return [f"other {where}"]
    return [f"{where}: {saved} there, {current} here"]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
