"""Lines, ticks and numbers of the report, against numbers derived by hand and properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.reporting.charts import HEIGHT, PLOT, course, line_chart, thin, ticks
from flows.reporting.text import duration, in_words, moment, number, with_intervals


@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(4, 40))
def test_thinning_keeps_first_last_lowest_and_highest(values: list[float | None], limit: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, limit)
    finite = [value for value in values if value is not None]
    assert len(kept) <= limit
    assert kept == sorted(set(kept), key=lambda point: point[0]) and set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    if finite:
        left = [value for _, value in kept if value is not None]
        assert (min(left), max(left)) == (min(finite), max(finite))


def test_a_line_is_drawn_where_its_values_are() -> None:
    # 0 to 1 are round numbers, so the plot's edges are 0 and 1: half the range lies in the middle of the plot
    chart = line_chart([("a", 0, [(0, 0.0), (5, 0.5), (10, 1.0)]), ("b", 1, [(0, None), (10, 0.5)])])
    left, right, top, bottom = (PLOT[edge] for edge in ("left", "right", "top", "bottom"))
    middle = f"{(left + right) / 2:.1f} {(top + bottom) / 2:.1f}"
    assert chart.series[0].path == f"M{left:.1f} {bottom:.1f}L{middle}L{right:.1f} {top:.1f}"
    assert chart.series[1].path == "" and chart.series[1].dots == ((right, (top + bottom) / 2),)
    assert bottom < HEIGHT


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (1234567, "1,234,567"), (0.5, "0.5"), (12.3456, "12.35"), (99999.96, "100,000")),
        *((1e-5, "1e-5"), (0.000125, "1.25e-4"), (2.5e-12, "2.5e-12"), (1e7, "1e7"), (-0.00123456, "-0.001235")),
        *((True, "yes"), (None, "–"), (math.inf, "inf")),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 9.96, 59.6, 3599.4, 3725, None)] == [
        *("0.0 s", "10 s", "1 min 0 s", "59 min 59 s", "1 h 2 min", "–")
    ]


def test_moments_are_of_utc_and_in_english() -> None:
    assert moment("2026-11-29T13:40:45+00:00") == "29 Nov 2026, 13:40 UTC"
    assert moment("2026-01-01T01:30:00+02:00") == "31 Dec 2025, 23:30 UTC"
    assert moment("2026-01-02 03:04:05") == "2 Jan 2026, 03:04"
    assert moment("yesterday") == "yesterday"


def test_the_course_of_a_noisy_line() -> None:
    """Of 0, 1, 0, 1, ... the means of 5 values are 2/5 around a 0 and 3/5 around a 1; at the ends of 1 and of 3."""
    points = [(float(step), float(step % 2)) for step in range(80)]
    found = course([(-1.0, None), *points])  # what is not a number is left out
    assert [value for _, value in found[:4]] == pytest.approx([0, 1 / 3, 2 / 5, 3 / 5])
    assert found[-1] == (79, 1) and [step for step, _ in found] == list(range(80))
    assert course(points[:39]) == course([(step, step / 80) for step, _ in points]) == []  # short; without noise


def test_ticks_are_round_and_reach_over_the_range() -> None:
    assert ticks(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0.13, 0.87) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.0, 2e-5) == [0, 5e-6, 1e-5, 1.5e-5, 2e-5]
    assert ticks(-3.0, 40.0) == [-20, 0, 20, 40]


def test_intervals_of_a_record_belong_to_their_metric() -> None:
    flat = {"accuracy": 0.5, "accuracy/high": 0.6, "accuracy/low": 0.4, "loss": 2.0, "loss/low": 1.0, "n/low": 3}
    assert with_intervals(flat) == {
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
        "loss": 2.0,  # has one edge only
        "n/low": 3,
    }


def test_sources_in_words() -> None:
    source = {"path": "", "parts": [{"name": "a.jsonl", "rows": 1200, "sha256": "ab" * 32}, {"name": "b", "rows": 3}]}
    assert in_words(source) == "parts: name: a.jsonl · rows: 1,200 · sha256: ababababab; name: b · rows: 3"
