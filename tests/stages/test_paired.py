"""Two evaluations of the same rows: p of the randomization test against all exchanges, its errors, the interval."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy
import pytest

from stages.evaluation.paired import Pairs
from stages.evaluation.scores import row_parts

DRAWS = 20_000


def of(candidate: list[float], baseline: list[float]) -> Pairs:
    def parts(values: list[float]) -> dict[str, tuple[float, float]]:
        return {f"row {index}": (value, 1.0) for index, value in enumerate(values)}

    return Pairs.of(parts(candidate), parts(baseline))


def test_three_rows_lost_and_none_won_by_hand() -> None:
    """Of the 2^3 exchanges of the rows that differ, one is as bad as the one seen; all are as good, or better."""
    pairs = of([0, 0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0, 1])
    assert pairs.chance_of_less(0.0, DRAWS, 0) == pytest.approx(1 / 8, abs=0.01)
    assert pairs.chance_of_more(0.0, DRAWS, 0) == 1.0
    assert pairs.difference(0).value == pytest.approx(-3 / 7, abs=1e-12)


def test_equal_evaluations_differ_by_nothing() -> None:
    pairs = of([0, 1, 1, 0.5], [0, 1, 1, 0.5])
    found = pairs.difference(3)
    assert (found.value, found.low, found.high, found.n) == (0.0, 0.0, 0.0, 4)
    assert pairs.chance_of_less(0.0, DRAWS, 0) == pairs.chance_of_more(0.0, DRAWS, 0) == 1.0


def test_a_candidate_that_is_worse_by_what_is_tolerated_is_let_through_no_more_often_than_said() -> None:
    """Few rows change, as of a small fine-tuning and greedy answers: all at once, by the binomial distribution of how
    many do. (By exchanges of shifted values the first case would be let through 20 times in 100.)"""
    for rows, tolerated in [(300, 0.01), (100, 0.03), (300, 0.02), (1000, 0.02)]:
        through = 0.0
        for lost in range(rows + 1):
            candidate = [0.0] * lost + [1.0] * (rows - lost)
            if of(candidate, [1.0] * rows).chance_of_more(-tolerated, DRAWS, 0, spread=1.0) > 0.05:
                break
            through += math.comb(rows, lost) * tolerated**lost * (1 - tolerated) ** (rows - lost)
        assert through < 0.07, (rows, tolerated)
        assert through > 0.03  # and it does let through what it can


def test_a_score_by_hand() -> None:
    """Two rows of three lose 0.3 and 0.1, one wins 0.1; with two more that differ by 0.5 the mean is -0.3 / 5."""
    pairs = of([0.2, 0.6, 0.9], [0.5, 0.7, 0.8])
    values = [-0.3, -0.1, 0.1, 0.5, -0.5]
    score = (-0.2 - statistics.mean(values)) / (statistics.stdev(values) / 5**0.5)
    expected = statistics.NormalDist().cdf(score)
    assert pairs.chance_of_more(-0.2, DRAWS, 0, spread=0.5) == pytest.approx(expected, abs=1e-12)
    # what is between all values: 0.9 - 0.2
    values = [-0.3, -0.1, 0.1, 0.7, -0.7]
    score = (-0.2 - statistics.mean(values)) / (statistics.stdev(values) / 5**0.5)
    assert pairs.chance_of_more(-0.2, DRAWS, 0) == pytest.approx(statistics.NormalDist().cdf(score), abs=1e-12)


def test_too_few_rows_show_nothing() -> None:
    """All right in both; of 20 rows that does not show that no hundredth was lost."""
    assert of([1.0] * 20, [1.0] * 20).chance_of_more(-0.01, DRAWS, 0, spread=1.0) > 0.3
    assert of([1.0] * 1000, [1.0] * 1000).chance_of_more(-0.01, DRAWS, 0, spread=1.0) < 0.001


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("true", [0.0, -0.1, 0.25])
def test_p_is_that_of_all_exchanges(seed: int, true: float) -> None:
    """Rows of several answers, unequally many, as an independent loop over all 2^9 exchanges of rows counts them."""
    random = numpy.random.default_rng(seed)
    rows = [f"row {index}" for index in range(9)]
    counts = random.integers(1, 5, (2, 9))
    sides = [
        {row: (float(random.integers(0, count + 1)), float(count)) for row, count in zip(rows, side, strict=True)}
        for side in counts
    ]
    pairs = Pairs.of(*sides)

    def difference(swaps: tuple[bool, ...]) -> float:
        totals = [[0.0, 0.0], [0.0, 0.0]]
        for row, swap in zip(rows, swaps, strict=True):
            (ours, our_count), (theirs, their_count) = sides[0][row], sides[1][row]
            one, other = (ours - true * our_count, our_count), (theirs, their_count)
            for total, (value, count) in zip(totals, (other, one) if swap else (one, other), strict=True):
                total[0] += value
                total[1] += count
        return totals[0][0] / totals[0][1] - totals[1][0] / totals[1][1]

    every = [difference(swaps) for swaps in itertools.product((False, True), repeat=9)]
    less = sum(one <= every[0] + 1e-12 for one in every) / len(every)
    if not true:
        more = sum(one >= every[0] - 1e-12 for one in every) / len(every)
        assert pairs.chance_of_more(true, DRAWS, 1) == pytest.approx(more, abs=0.015)
    assert pairs.chance_of_less(true, DRAWS, 1) == pytest.approx(less, abs=0.015)


def stopped(candidate_rate: float, baseline_rate: float, rows: int, runs: int) -> float:
    """Share of drawn evaluations of which the candidate is found worse at 5 %."""
    random = numpy.random.default_rng(7)
    found = 0
    for run in range(runs):
        hard_R = random.random(rows) - 0.5  # what the two have in common: some rows are hard for both
        candidate, baseline = (
            ((random.random(rows) + 0.5 * hard_R) < rate).astype(float).tolist()
            for rate in (candidate_rate, baseline_rate)
        )
        found += of(candidate, baseline).chance_of_less(0.0, 1000, run) <= 0.05
    return found / runs


def test_an_equal_candidate_is_stopped_no_more_often_than_said() -> None:
    """Over 1,000 pairs of evaluations, with the three standard deviations that so many leave to chance. Percentiles of
    the bootstrap, and a t test, say `worse` too often of so few rows."""
    assert stopped(0.7, 0.7, 20, 1000) <= 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_a_worse_candidate_is_stopped() -> None:
    assert stopped(0.6, 0.75, 300, 100) >= 0.95


def test_the_interval_is_that_of_the_paired_bootstrap() -> None:
    """Against resampled differences: where all rows lose 0.1, no draw of rows gives another number."""
    random = numpy.random.default_rng(0)
    baseline = random.random(50).tolist()
    found = of([value - 0.1 for value in baseline], baseline).difference(5)
    assert [found.value, found.low, found.high] == pytest.approx([-0.1] * 3, abs=1e-12)
    noise = random.normal(0, 1, 400)
    found = of(noise.tolist(), [0.0] * 400).difference(5)
    draws = [numpy.mean(random.choice(noise, 400)) for _ in range(4000)]
    low, high = numpy.quantile(draws, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.015)


def test_rows_that_one_side_has_alone_are_told() -> None:
    pairs = Pairs.of({"a": (1.0, 1.0), "b": (0.0, 1.0)}, {"b": (1.0, 1.0), "c": (1.0, 1.0)})
    assert (len(pairs), pairs.alone) == (1, ("a", "c"))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", {"a": (1.0, 2.0), "b": (1.0, 1.0)}),
        ("loss", {"a": (5.0, 10.0), "b": (60.0, 30.0)}),  # once a row, by its tokens
        ("rewards/mean", {"a": (1.5, 2.0)}),
        ("rewards/short/mean", {"a": (3.0, 2.0), "b": (4.0, 1.0)}),
        ("rewards/long/mean", {}),
    ],
)
def test_parts_of_rows_by_hand(metric: str, expected: Any) -> None:
    first, second = {"row_id": "a", "loss": 0.5, "loss_tokens": 10}, {"row_id": "b", "loss": 2.0, "loss_tokens": 30}
    samples = [
        {**first, "completion": "x", "correct": True, "reward": 1.0, "reward_short": 1.0},
        {**first, "completion": "y", "correct": False, "reward": 0.5, "reward_short": 2.0},
        {**second, "completion": "z", "correct": True, "reward": None, "reward_short": 4.0},
        {**second, "completion": "z", "correct": None, "reward": None, "reward_short": None},
        {"row_id": "c", "correct": False, "chosen_score": 1.0, "rejected_score": 2.0},  # a pair's verdict
    ]
    assert row_parts(metric, samples) == expected
