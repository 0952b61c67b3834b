"""Line charts as coordinates: thinning, scales, ticks. Drawing is the template's work."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from flows.reporting.text import number

WIDTH, HEIGHT = 380, 180
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24
PLOT = {
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "top": TOP,
    "bottom": HEIGHT - BOTTOM,
}
"""The drawing's size and the edges of the plot in it, SVG units."""

MAX_POINTS = 1_000
DIGITS = 6
"""Significant ones of the values that pointing shows."""

SMOOTHED_FROM = 40
"""Points that a line has at least where its course is drawn too."""
NOISY = 4.0
"""The way up and down along the line, in ranges of its values, from which on it is noisy."""
WINDOW = 20
"""The course at a step is the mean of a stretch of 1 / WINDOW of the line around it."""
COURSE_POINTS = 150

Point = tuple[float, float | None]
"""(step, value); None where the metric is not a finite number at that step."""


@dataclass(frozen=True)
class Series:
    """One line: its points in data units (`points_json`, for hovering) and as SVG path data."""

    name: str
    color: int
    points_json: str
    path: str
    course: str
    """Path data of what is left without the noise; empty where there is little."""
    dots: tuple[tuple[float, float], ...]
    """Points without a neighbour, which a line would not show."""
    first: str
    last: str
    count: int
    thinned: bool
    missing: int


@dataclass(frozen=True)
class Chart:
    """Coordinates are in SVG units; `x_range` and `y_range` are the data's at the plot's edges."""

    series: tuple[Series, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: first, last, and the lowest and highest of equal stretches between them."""
    if len(points) <= limit:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = (limit - 2) // 2
    inner = len(points) - 2
    for stretch in range(stretches):
        indices = range(1 + inner * stretch // stretches, 1 + inner * (stretch + 1) // stretches)
        finite = [(points[index][1], index) for index in indices if points[index][1] is not None]
        if finite:
            kept.add(min(finite)[1])
            kept.add(max(finite)[1])
        else:
            kept.add(indices[0])
    return [points[index] for index in sorted(kept)]


def course(points: Sequence[Point]) -> list[tuple[float, float]]:
    """A noisy line smoothed: at each step the mean of the finite values in a window around it, which is narrower at
    both ends so that it stays centred. Empty for a short line or one without noise."""
    finite = [(step, value) for step, value in points if value is not None]
    if len(finite) < SMOOTHED_FROM:
        return []
    values = [value for _, value in finite]
    way = sum(abs(b - a) for a, b in pairwise(values))
    if not way > NOISY * (max(values) - min(values)):
        return []
    sums = list(accumulate(values, initial=0.0))
    half = max(2, len(values) // (2 * WINDOW))
    means = []
    for index, (step, _) in enumerate(finite):
        reach = min(half, index, len(values) - 1 - index)
        first, end = index - reach, index + reach + 1
        means.append((step, (sums[end] - sums[first]) / (end - first)))
    kept = range(0, len(means) - 1, -(-len(means) // COURSE_POINTS))
    return [*(means[index] for index in kept), means[-1]]


def line_chart(
    lines: Sequence[tuple[str, int, Sequence[Point]]], limit: int = MAX_POINTS, *, smooth: bool = False
) -> Chart:
    """A chart of (name, colour, points) lines, of which at least one has a finite value; each of `limit` points at
    most. `smooth`: with the course of noisy ones."""
    thinned = [(name, color, points, thin(points, limit)) for name, color, points in lines]
    steps = [step for *_, kept in thinned for step, _ in kept]
    values = [value for *_, kept in thinned for _, value in kept if value is not None]
    x_range = _widened(min(steps), max(steps))
    y_ticks = ticks(*_widened(min(values), max(values)))
    y_range = (min(y_ticks[0], min(values)), max(y_ticks[-1], max(values)))
    return Chart(
        series=tuple(_series(*line, x_range, y_range, smooth) for line in thinned),
        x_range=x_range,
        y_range=y_range,
        x_ticks=tuple(
            (_x(tick, x_range), number(tick))
            for tick in ticks(*x_range)
            if x_range[0] <= tick <= x_range[1] and tick == int(tick)  # there is no half step
        ),
        y_ticks=tuple((_y(tick, y_range), number(tick)) for tick in y_ticks),
    )


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """About `target` round numbers (1, 2, 2.5 or 5 times a power of ten) that reach from low to high."""
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * abs(low) or 0.5
    return low - margin, high + margin


def _x(step: float, x_range: tuple[float, float]) -> float:
    return LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)


def _y(value: float, y_range: tuple[float, float]) -> float:
    return HEIGHT - BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)


def _series(
    name: str,
    color: int,
    points: Sequence[Point],
    kept: Sequence[Point],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    smooth: bool,
) -> Series:
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in kept:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((_x(step, x_range), _y(value, y_range)))
    finite = [value for _, value in points if value is not None]
    smoothed = [(_x(step, x_range), _y(value, y_range)) for step, value in (course(points) if smooth else ())]
    return Series(
        name=name,
        color=color,
        points_json=json.dumps([[_whole(step), _rounded(value)] for step, value in kept], separators=(",", ":")),
        path="".join(_path_of(run) for run in runs if len(run) > 1),
        course=_path_of(smoothed) if smoothed else "",
        dots=tuple(run[0] for run in runs if len(run) == 1),
        first=number(finite[0]) if finite else "–",
        last=number(finite[-1]) if finite else "–",
        count=len(points),
        thinned=len(kept) < len(points),
        missing=len(points) - len(finite),
    )


def _path_of(run: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run)


def _whole(step: float) -> float:
    return int(step) if step == int(step) else step


def _rounded(value: float | None) -> float | None:
    """To what the eye can tell: digits are most of a page of long curves."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
