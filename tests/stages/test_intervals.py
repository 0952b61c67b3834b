"""Bootstrap intervals against exact binomial quantiles and a plain loop, Wilson's against published values."""

import math
import random

import pytest

from stages.evaluation import intervals
from stages.evaluation.intervals import mean_estimate, ratio_estimate, share_estimate


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


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_wilsons_interval(hits: int, n: int, low: float, high: float) -> None:
    found = share_estimate([1.0] * hits + [0.0] * (n - hits), [1.0] * n)
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    # of those that are no hits, it is the mirror image
    other = share_estimate([0.0] * hits + [1.0] * (n - hits), [1.0] * n)
    assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high), abs=1e-12)


def test_a_share_of_nothing_or_all_has_a_width() -> None:
    # z^2 / (n + z^2), z = 1.959964: 3.841459 / 503.841459
    nothing = share_estimate([0.0] * 500, [4.0] * 500)
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(0.007624341, abs=1e-9)
    everything = share_estimate([4.0] * 500, [4.0] * 500)
    assert (everything.value, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(1 - 0.007624341, abs=1e-9)


def test_answers_that_repeat_each_other_say_no_more() -> None:
    once = share_estimate([1.0] * 30 + [0.0] * 20, [1.0] * 50)
    four_times = share_estimate([4.0] * 30 + [0.0] * 20, [4.0] * 50)
    assert (four_times.low, four_times.high) == pytest.approx((once.low, once.high), abs=1e-12)
    # half of every row's answers are hits: as good as 200 that do not depend on each other, and no better
    halves, independent = share_estimate([2.0] * 50, [4.0] * 50), share_estimate([1.0, 0.0] * 100, [1.0] * 200)
    assert (halves.low, halves.high) == pytest.approx((independent.low, independent.high), abs=1e-12)
    # rows without an answer do not count
    assert share_estimate([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]) == share_estimate([1.0, 0.0], [1.0, 1.0])
