"""Images of every source as one type in memory, and their splits.

`load` reads a source, `split` makes its long-tailed splits, `write` and `read` keep them in one
`.npz` that holds no code, and `folds_of` cuts a source for cross-validation.
"""

from ssnas.data.sources import load
from ssnas.data.splits import folds, folds_of, read, split, write
from ssnas.data.types import Dataset, Source, Splits

__all__ = ["Dataset", "Source", "Splits", "folds", "folds_of", "load", "read", "split", "write"]
