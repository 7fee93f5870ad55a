"""Images of every source as one type in memory, and their splits.

`load` reads a source, `split` makes its long-tailed splits, `write` and `read` keep them in one
`.npz` that holds no code, and `folds_of` cuts a source for cross-validation.

The names below are imported when they are first used. The package's own modules name the module
that they need, so that a stage depends on no more than that: a change in how folders are read
re-runs no search.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssnas.data.sources import load
    from ssnas.data.splits import folds, folds_of, read, split, write
    from ssnas.data.types import Dataset, Source, Splits

__all__ = ["Dataset", "Source", "Splits", "folds", "folds_of", "load", "read", "split", "write"]

_MODULES = {
    **dict.fromkeys(("Dataset", "Source", "Splits"), "types"),
    **dict.fromkeys(("folds", "folds_of", "read", "split", "write"), "splits"),
    "load": "sources",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
