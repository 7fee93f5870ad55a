"""The comparison of two systems over the seeds that both have run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Comparison:
    """A mean difference with the half width of its 95 % interval, over n seeds.

    The half width is infinite for one seed, which says nothing of the noise.
    """

    mean: float
    half_width: float
    n: int

    @property
    def beyond_noise(self) -> bool:
        """True if the interval leaves out 0."""
        return abs(self.mean) > self.half_width

    def text(self, decimals: int = 2) -> str:
        """Write the comparison with its verdict.

        >>> Comparison(-2.357, 1.1, 5).text()
        '−2.36 ± 1.10 (beyond the noise, n = 5)'
        """
        mean = f"{self.mean:+.{decimals}f}".replace("-", "−")
        if self.n == 1:
            return f"{mean} (noise unknown, n = 1)"
        verdict = "beyond" if self.beyond_noise else "within"
        return f"{mean} ± {self.half_width:.{decimals}f} ({verdict} the noise, n = {self.n})"


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> Comparison | None:
    """Compare two systems by the differences other − ours over their common seeds.

    With d_s = other_s − ours_s over n common seeds, mean d̄ and sample deviation s (n − 1), the
    interval is d̄ ± t_{0.975, n−1} s / √n (Student 1908). It assumes that the d_s are independent
    draws from one normal distribution; two figures of one seed may depend on each other, as they
    do where rows share a split. With few seeds it is wide, and it says nothing of other data. No
    correction is made for the number of rows that a table compares.

    Args:
        ours: figure by seed.
        other: likewise, in the same unit.

    Returns:
        None if no seed is common.

    >>> paired({0: 10.0, 1: 12.0, 2: 11.0}, {0: 20.0, 1: 24.0}).text()
    '+11.00 ± 12.71 (within the noise, n = 2)'
    """
    differences = [other[seed] - ours[seed] for seed in sorted(ours.keys() & other.keys())]
    n = len(differences)
    if n == 0:
        return None
    half_width = math.inf
    if n > 1:
        quantile = float(student_t.ppf(0.975, n - 1))
        half_width = quantile * statistics.stdev(differences) / math.sqrt(n)
    return Comparison(statistics.fmean(differences), half_width, n)
