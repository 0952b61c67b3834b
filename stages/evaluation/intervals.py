"""Numbers with percentile bootstrap intervals over rows (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.seeds import generator

if TYPE_CHECKING:
    import numpy

RESAMPLES = 1000
LEVEL = 0.95
_DRAWS_AT_ONCE = 4_000_000
"""Row indices held at a time."""


@dataclass(frozen=True)
class Estimate:
    """A number, the ends of its interval, and the rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same after an increasing function: percentiles move along with it."""
        return Estimate(function(self.value), function(self.low), function(self.high), self.n)


def ratio_estimate(sums: Sequence[float], counts: Sequence[float], seed: int) -> Estimate:
    """Total of `sums` / total of `counts`, one entry of each a row: a mean, also where rows have unequal weights.

    The interval's ends are the 2.5 % and 97.5 % quantiles of the ratio over 1,000 draws of as many rows with
    replacement. Every metric of one seed and number of rows sees the same draws. Rows that count 0 are left out.
    """
    import numpy

    counts_R = numpy.asarray(counts, dtype=numpy.float64)
    sums_R = numpy.asarray(sums, dtype=numpy.float64)[counts_R > 0]
    counts_R = counts_R[counts_R > 0]
    assert len(counts_R) > 0
    low, high = numpy.quantile(_resampled(sums_R, counts_R, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(sums_R.sum() / counts_R.sum()), float(low), float(high), len(counts_R))


def mean_estimate(values: Sequence[float], seed: int) -> Estimate:
    """The mean of one value a row."""
    return ratio_estimate(values, [1.0] * len(values), seed)


def _resampled(sums_R: numpy.ndarray, counts_R: numpy.ndarray, seed: int) -> numpy.ndarray:
    """[RESAMPLES] ratios."""
    import numpy

    rows = len(sums_R)
    draws = generator(seed, "bootstrap", rows)
    at_once = max(1, _DRAWS_AT_ONCE // rows)
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        index_SR = draws.integers(0, rows, (min(at_once, RESAMPLES - start), rows))
        ratios.append(sums_R[index_SR].sum(1) / counts_R[index_SR].sum(1))
    return numpy.concatenate(ratios)
