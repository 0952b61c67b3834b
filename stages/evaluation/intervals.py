"""Numbers with intervals over rows: means by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13), shares
by Wilson's score interval (1927), which has a width where all rows agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
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


def paired_difference(
    candidate: tuple[numpy.ndarray, numpy.ndarray], baseline: tuple[numpy.ndarray, numpy.ndarray], seed: int
) -> Estimate:
    """Ratio of `candidate` less that of `baseline`, each (sums [R], counts [R]) of the same rows, with counts above 0.

    Both see the same draws of rows, so the interval is that of the paired bootstrap.
    """
    import numpy

    drawn_S = _resampled(*candidate, seed) - _resampled(*baseline, seed)
    low, high = numpy.quantile(drawn_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = candidate[0].sum() / candidate[1].sum() - baseline[0].sum() / baseline[1].sum()
    return Estimate(float(value), float(low), float(high), len(candidate[0]))


def share_estimate(hits: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Total of `hits` / total of `counts`, one entry of each a row: so many of its answers are hits.

    Answers of one row are alike, so the interval is Wilson's of fewer independent ones: as many as would vary as the
    share does over rows (the effective sample size of Korn and Graubard 1998), which of one answer a row is the number
    of rows. Where every answer is a hit, or none is, each row counts as one. Rows that count 0 are left out.
    """
    rows = [(hit, count) for hit, count in zip(hits, counts, strict=True) if count > 0]
    assert rows
    total = sum(count for _, count in rows)
    share = sum(hit for hit, _ in rows) / total
    variance = sum((hit - share * count) ** 2 for hit, count in rows) / total**2
    n = float(len(rows))
    if 0 < share < 1:
        n = min(total, share * (1 - share) / variance) if variance > 0 else total
    low, high = _wilson(share, n)
    return Estimate(share, low, high, len(rows))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """The shares that a test at 1 - LEVEL does not tell from the one seen in n trials."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


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
