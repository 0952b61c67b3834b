"""Axes of settings and metrics: kinds, places and labels, derived by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from flows.reporting.scales import CHARACTER, MARGIN, of_metric, of_setting, readable


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1e-5, 3e-5], "linear"),
        ([1e-5, 1e-4], "log"),
        ([0.1, 3, 1], "log"),
        ([0, 0.1, 0.2], "linear"),
        ([-1, 1], "linear"),
        ([0, 1e-5, 1e-3], "in order"),
        ([7], "in order"),
        ([True, False], "in order"),
        (["muon", "adamw"], "in order"),
        ([None, 0.1, 0.2], "in order"),
        ([[0.9, 0.99], [0.9, 0.95]], "in order"),
    ],
)
def test_kinds(values: list[Any], kind: str) -> None:
    assert of_setting(values).kind == kind


def test_places() -> None:
    """The edges keep a margin; equal ratios are equal distances; categories stand in the middle of equal parts."""
    log = of_setting([1e-5, 1e-3, 1e-4])
    assert [log.at(value) for value in (1e-5, 1e-4, 1e-3)] == pytest.approx([MARGIN, 0.5, 1 - MARGIN])
    linear = of_setting([0, 4, 1])
    assert [linear.at(value) for value in (0, 1, 4)] == pytest.approx(
        [MARGIN, MARGIN + (1 - 2 * MARGIN) / 4, 1 - MARGIN]
    )
    order = of_setting(["muon", None, [1], "muon"])
    assert [order.at(value) for value in ("muon", None, [1])] == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    assert order.ticks == ((1 / 6, "muon"), (3 / 6, "null"), (5 / 6, "[1]"))


def test_of_a_metric() -> None:
    scale = of_metric([0.13, 0.87])  # 0 to 1 in steps of 0.2, as test_report_charts has it
    assert (scale.kind, scale.at(0.0), scale.at(0.25), scale.at(1.0)) == ("linear", 0.0, 0.25, 1.0)
    scale = of_metric([0.5, 300.0])
    assert [label for _, label in scale.ticks] == ["0.1", "1", "10", "100", "1,000"]
    assert (scale.kind, scale.at(0.1), scale.at(10.0), scale.at(1000.0)) == ("log", 0.0, 0.5, 1.0)
    assert of_metric([0.0, 300.0]).kind == "linear"
    assert of_metric([2.0]).at(2.0) == pytest.approx(0.5)


def test_labels_that_would_run_into_one_another_give_way_to_round_ones() -> None:
    few = of_setting([3e-5, 1e-4])
    assert [label for _, label in readable(few, 300)] == ["3e-5", "0.0001"]
    many = of_setting([10 ** (-6 + step / 3) for step in range(13)])
    assert [label for _, label in readable(many, 300)] == ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]


@given(some.lists(some.floats(1e-6, 1e6) | some.text(max_size=9), min_size=1, max_size=30), some.floats(50, 900))
def test_labels_never_touch(values: list[Any], width: float) -> None:
    scale = of_setting(values)
    assert all(0 <= scale.at(value) <= 1 for value in values)
    kept = readable(scale, width)
    assert set(kept) <= {*scale.ticks, *scale.round_ticks} and kept
    for (left, a), (right, b) in pairwise(kept):
        assert (right - left) * width >= (len(a) + len(b)) / 2 * CHARACTER


@given(some.lists(some.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=20))
def test_metrics_lie_in_the_plot(values: list[float]) -> None:
    scale = of_metric(values)
    assert all(-1e-9 <= scale.at(value) <= 1 + 1e-9 for value in values)
    assert all(math.isfinite(place) for place, _ in scale.ticks)
