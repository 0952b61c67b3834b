"""The metric of a sweep against each setting, and over both where two vary, as coordinates. Drawing is the template's
work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.closing import metric_in_words
from flows.reporting import scales
from flows.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from flows.reporting.curves import COLORS
from flows.standings import Measured, Row, Standings
from flows.standings_table import setting_in_words

SPREAD = 16.0
"""SVG units over which groups stand beside each other at one value, so that their intervals can be told apart."""
CELL, CELL_HEIGHT, HEAD, SIDE = 88, 34, 26, 92
"""Of the heat map: a cell, the room for its column heads and for its row heads; SVG units."""
FAINTEST, STRONGEST = 0.06, 0.62
"""Opacity of the cells of the worst and the best; text stays readable on both."""


@dataclass(frozen=True)
class Dot:
    """A trial. Coordinates in SVG units; whiskers are None without an interval."""

    trial: int
    setting: str
    value: float
    words: str
    x: float
    y: float
    low: float | None
    high: float | None
    best: bool


@dataclass(frozen=True)
class Group:
    """Trials that are equal in all other settings; `words` says in which. `path`: SVG path data of their line. Of too
    many groups to tell apart only that of the best trial has a colour."""

    words: str
    color: int
    dots: tuple[Dot, ...]
    path: str


@dataclass(frozen=True)
class Plot:
    """One setting. `scale` and `metric_scale`: linear, log or in order."""

    setting: str
    scale: str
    metric_scale: str
    groups: tuple[Group, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Cell:
    """A combination; `opacity` of its colour, the stronger the better. None: it has no number."""

    trial: int | None
    x: float
    y: float
    text: str
    words: str
    opacity: float | None
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """`columns` and `rows`: the values of the two settings with where they stand."""

    across: str
    down: str
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    cells: tuple[Cell, ...]
    width: float
    height: float


def setting_plots(found: Standings, settings: Sequence[str]) -> tuple[Plot, ...]:
    """One plot a setting, of the trials that have the metric and the setting."""
    plots = []
    for name in settings:
        rows = [row for row in found.rows if _number(found, row) is not None and name in row.settings]
        if rows:
            plots.append(_plot(found, rows, name, [other for other in settings if other != name]))
    return tuple(plots)


def heat_map(found: Standings, settings: Sequence[str]) -> HeatMap | None:
    """None: not two settings, or nothing to show."""
    numbers = [number for row in found.rows if (number := _number(found, row)) is not None]
    if len(settings) != 2 or not numbers:
        return None
    across, down = settings
    columns, lines = (_values(found.rows, name) for name in settings)
    at = {(_key(row.settings.get(across)), _key(row.settings.get(down))): row for row in found.rows}
    cells = tuple(
        _cell(found, at.get((_key(column), _key(line))), {across: column, down: line}, (i, j), numbers)
        for j, line in enumerate(lines)
        for i, column in enumerate(columns)
    )
    return HeatMap(
        across,
        down,
        tuple((SIDE + CELL * (i + 0.5), setting_in_words(value)) for i, value in enumerate(columns)),
        tuple((HEAD + CELL_HEIGHT * (j + 0.5), setting_in_words(value)) for j, value in enumerate(lines)),
        cells,
        width=SIDE + CELL * len(columns) + 4,
        height=HEAD + CELL_HEIGHT * len(lines) + 4,
    )


def _plot(found: Standings, rows: Sequence[Row], name: str, others: Sequence[str]) -> Plot:
    x = scales.of_setting(_values(rows, name))
    measured = [_measured(found, row) for row in rows]
    y = scales.of_metric([edge for one in measured for edge in (one.value, one.low, one.high) if edge is not None])
    grouped: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: x.at(row.settings[name])):
        grouped.setdefault(_words(row, others), []).append(row)
    shifts = _shifts(len(grouped))
    told_apart = len(grouped) <= COLORS
    groups = []
    for index, words in enumerate(_in_order_of(grouped, rows, others)):
        dots = tuple(_dot(found, row, name, (x, y), shifts[index]) for row in grouped[words])
        path = "M" + "L".join(f"{dot.x:.1f} {dot.y:.1f}" for dot in dots) if len(dots) > 1 else ""
        color = index if told_apart else COLORS * (not any(dot.best for dot in dots))
        groups.append(Group(words, color, dots, path))
    width = WIDTH - LEFT - RIGHT
    return Plot(
        name,
        x.kind,
        y.kind,
        tuple(groups),
        x_ticks=tuple((_across(place), label) for place, label in scales.readable(x, width)),
        y_ticks=tuple((_down(place), label) for place, label in y.ticks),
    )


def _in_order_of(grouped: Mapping[str, Any], rows: Sequence[Row], others: Sequence[str]) -> list[str]:
    """Groups as their trials are numbered, so that the legend has the order of the values."""
    by_trial = sorted(rows, key=lambda row: row.trial or 0)
    return [words for words in dict.fromkeys(_words(row, others) for row in by_trial) if words in grouped]


def _shifts(groups: int) -> list[float]:
    step = min(6.0, SPREAD / max(groups - 1, 1))
    return [(index - (groups - 1) / 2) * step for index in range(groups)]


def _dot(found: Standings, row: Row, name: str, axes: tuple[scales.Scale, scales.Scale], shift: float) -> Dot:
    (x, y), one = axes, _measured(found, row)
    return Dot(
        trial=row.trial or 0,
        setting=setting_in_words(row.settings[name]),
        value=one.value,
        words=metric_in_words(one.value, one.low, one.high),
        x=_across(x.at(row.settings[name])) + shift,
        y=_down(y.at(one.value)),
        low=None if one.low is None else _down(y.at(one.low)),
        high=None if one.high is None else _down(y.at(one.high)),
        best=_is_best(found, row),
    )


def _cell(
    found: Standings, row: Row | None, values: Mapping[str, Any], place: tuple[int, int], numbers: Sequence[float]
) -> Cell:
    """`values`: of the two settings; `numbers`: of all trials."""
    where = " ".join(f"{name}={setting_in_words(value)}" for name, value in values.items())
    x, y = SIDE + CELL * place[0], HEAD + CELL_HEIGHT * place[1]
    if row is None:
        return Cell(None, x, y, "–", f"{where}: no trial yet", None, best=False)
    number = _number(found, row)
    if number is None:
        text = row.state if row.state != "ok" else "–"
        return Cell(row.trial, x, y, text, f"trial {row.trial}, {where}: {row.error or 'no number'}", None, best=False)
    one = _measured(found, row)
    worst, best = (max(numbers), min(numbers)) if found.best == "lowest" else (min(numbers), max(numbers))
    share = (number - worst) / (best - worst) if best != worst else 1.0
    words = f"trial {row.trial}, {where}: {found.metrics[0]} {metric_in_words(one.value, one.low, one.high)}"
    opacity = FAINTEST + share * (STRONGEST - FAINTEST)
    return Cell(row.trial, x, y, metric_in_words(one.value), words, round(opacity, 3), _is_best(found, row))


def _measured(found: Standings, row: Row) -> Measured:
    """The metric that trials are judged by, without edges that are no numbers."""
    one = row.metrics[found.metrics[0]]
    low, high = (Measured(edge).number for edge in (one.low, one.high))
    return Measured(one.value, low, high)


def _number(found: Standings, row: Row) -> float | None:
    one = row.metrics.get(found.metrics[0]) if found.metrics else None
    return None if one is None else one.number


def _is_best(found: Standings, row: Row) -> bool:
    return found.first is not None and found.first.trial == row.trial


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """In the order of the trials, which is that in which they were given."""
    by_trial = sorted((row for row in rows if name in row.settings), key=lambda row: row.trial or 0)
    return list({_key(row.settings[name]): row.settings[name] for row in by_trial}.values())


def _words(row: Row, names: Sequence[str]) -> str:
    return " ".join(f"{name}={setting_in_words(row.settings[name])}" for name in names if name in row.settings)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _across(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _down(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)
