"""Axes of settings and metrics: where a value lies between the two ends of a plot, and what stands beside the axis."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flows.reporting.charts import ticks
from flows.reporting.text import number
from flows.standings_table import setting_in_words

DECADE, HUNDREDFOLD = 10.0, 100.0
MARGIN = 0.08
"""Of the plot, between its ends and the values of a setting."""
MAX_TICKS = 6
CHARACTER = 6.5
"""Width of one in a tick's label, SVG units."""


Tick = tuple[float, str]


@dataclass(frozen=True)
class Scale:
    """`kind`: linear, log or in order (evenly spaced). `at` gives 0 to 1; `ticks` are (place, label). `round_ticks`: in
    their place where they are too many."""

    kind: str
    at: Callable[[Any], float]
    ticks: tuple[Tick, ...]
    round_ticks: tuple[Tick, ...] = ()


def of_setting(values: Sequence[Any]) -> Scale:
    """Of the values that a setting takes, with a tick at each. Numbers are to scale, by their logarithms where they
    span a decade; not where zero or less stands among such. All else is in the order given."""
    kept = list({_key(value): value for value in values}.values())
    if not all(_is_number(value) for value in kept):
        return _in_order(kept)
    kept.sort()
    sizes = [abs(value) for value in kept if value]
    wide = len(sizes) > 1 and max(sizes) / min(sizes) >= DECADE
    if wide and kept[0] > 0:
        place = _between(math.log(kept[0]), math.log(kept[-1]))
        powers = range(math.ceil(math.log10(kept[0]) - 1e-9), math.floor(math.log10(kept[-1]) + 1e-9) + 1)
        return _with_ticks("log", lambda value: place(math.log(value)), kept, [10.0**power for power in powers])
    if len(kept) < 2 or (wide and max(sizes) / min(sizes) >= HUNDREDFOLD):
        return _in_order(kept)
    round_ones = [mark for mark in ticks(kept[0], kept[-1]) if kept[0] <= mark <= kept[-1]]
    return _with_ticks("linear", _between(kept[0], kept[-1]), kept, round_ones)


def of_metric(values: Sequence[float]) -> Scale:
    """Over finite numbers, between round ones; by their logarithms where they span two decades."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= HUNDREDFOLD:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = -(-(last - first) // MAX_TICKS)
        powers = range(first, last + 1, step)

        def at(value: float) -> float:
            return (math.log10(value) - first) / (last - first)

        return Scale("log", at, tuple((at(10.0**power), number(10.0**power)) for power in powers))
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - (0.5 * abs(low) or 0.5), high + (0.5 * abs(high) or 0.5)
    marks = ticks(low, high)
    first_mark, last_mark = min(marks[0], low), max(marks[-1], high)

    def place(value: float) -> float:
        return (value - first_mark) / (last_mark - first_mark)

    return Scale("linear", place, tuple((place(mark), number(mark)) for mark in marks))


def readable(scale: Scale, width: float) -> list[Tick]:
    """The ticks if their labels do not run into one another, else of the round ones those that do not. `width`: of the
    plot, in SVG units."""
    kept = _apart(scale.ticks, width)
    return kept if len(kept) == len(scale.ticks) or len(scale.round_ticks) < 2 else _apart(scale.round_ticks, width)


def _apart(found: Sequence[Tick], width: float) -> list[Tick]:
    """The first and the last before others."""
    kept: list[Tick] = []
    for tick in [*found[:1], *found[1:][-1:], *found[1:-1]]:
        sides = sorted([*kept, tick])
        gaps = ((b[0] - a[0]) * width - (len(a[1]) + len(b[1])) / 2 * CHARACTER for a, b in pairwise(sides))
        if all(gap >= CHARACTER for gap in gaps):
            kept = sides
    return kept


def _in_order(values: Sequence[Any]) -> Scale:
    places = {_key(value): (index + 0.5) / len(values) for index, value in enumerate(values)}
    return _with_ticks("in order", lambda value: places[_key(value)], values)


def _with_ticks(
    kind: str, at: Callable[[Any], float], values: Sequence[Any], round_values: Sequence[float] = ()
) -> Scale:
    own, round_ones = (
        tuple((at(value), setting_in_words(value)) for value in found) for found in (values, round_values)
    )
    return Scale(kind, at, own, round_ones)


def _between(low: float, high: float) -> Callable[[float], float]:
    return lambda value: MARGIN + (value - low) / (high - low) * (1 - 2 * MARGIN)


def _key(value: Any) -> str:
    return json.dumps(float(value) if _is_number(value) else value, sort_keys=True, default=str)  # 1 is 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
