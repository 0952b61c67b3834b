"""Bootstrap intervals against exact binomial quantiles and a plain loop."""

import math
import random

import pytest

from stages.evaluation import intervals
from stages.evaluation.intervals import mean_estimate, ratio_estimate


def binomial_quantile(n: int, p: float, level: float) -> int:
    """Least k with P(X <= k) >= level."""
    below = 0.0
    for k in range(n + 1):
        below += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if below >= level:
            return k
    raise AssertionError


@pytest.mark.parametrize(("right", "n"), [(60, 200), (190, 200), (25, 50)])
def test_shares_have_the_quantiles_of_the_binomial(right: int, n: int) -> None:
    # a resample of n rows holds Binomial(n, right / n) right ones, so the quantiles are known exactly
    found = mean_estimate([1.0] * right + [0.0] * (n - right), seed=3)
    assert (found.value, found.n) == (right / n, n)
    # a quantile of 1,000 draws is off by about one standard deviation / 12; three such errors and one count
    slack = 3 / 12 * math.sqrt(right / n * (1 - right / n) / n) + 1 / n
    assert found.low == pytest.approx(binomial_quantile(n, right / n, 0.025) / n, abs=slack)
    assert found.high == pytest.approx(binomial_quantile(n, right / n, 0.975) / n, abs=slack)


def test_ratio_agrees_with_a_plain_loop() -> None:
    draws = random.Random(5)
    counts = [draws.randint(1, 30) for _ in range(80)]
    sums = [count * draws.gauss(2.0, 0.5) for count in counts]
    ratios = []
    for _ in range(4000):
        rows = [draws.randrange(80) for _ in range(80)]
        ratios.append(sum(sums[row] for row in rows) / sum(counts[row] for row in rows))
    ratios.sort()
    found = ratio_estimate(sums, counts, seed=1)
    assert found.value == pytest.approx(sum(sums) / sum(counts), rel=1e-12)
    width = ratios[3899] - ratios[99]
    assert found.low == pytest.approx(ratios[99], abs=0.1 * width)
    assert found.high == pytest.approx(ratios[3899], abs=0.1 * width)


def test_rows_without_weight_do_not_count() -> None:
    assert ratio_estimate([1.0, 5.0, 0.0], [1, 0, 2], seed=0) == ratio_estimate([1.0, 0.0], [1, 2], seed=0)


def test_the_seed_decides_and_the_memory_budget_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 7) for i in range(50)]
    whole = mean_estimate(values, seed=9)
    assert mean_estimate(values, seed=10) != whole
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 120)
    assert mean_estimate(values, seed=9) == whole


def test_equal_rows_and_a_single_row_have_no_width() -> None:
    assert mean_estimate([2.5], seed=0) == mean_estimate([2.5], seed=1)
    found = mean_estimate([1.0] * 30, seed=0)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)
