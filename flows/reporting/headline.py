"""The run's result: every evaluation metric across the models, as bars with intervals and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.reporting.charts import ticks
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import number, with_intervals
from flows.reporting.wiring import Wiring

WIDTH, ROW = 420, 34
LEFT, RIGHT, TOP, BOTTOM = 118, 62, 4, 22
SECONDARY = ("completions/", "rewards/")
"""Lengths, scores and the like: what these metrics begin with."""
BARS = {"width": WIDTH, "row": ROW, "left": LEFT}


@dataclass(frozen=True)
class Measurement:
    """One number of one evaluation. `low` and `high` are its interval, `n` what it was counted over."""

    stage: str
    model: str
    data: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None

    @property
    def text(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


@dataclass(frozen=True)
class Bar:
    """A measurement with SVG coordinates along the x axis; whiskers are None without an interval."""

    of: Measurement
    y: float
    start: float
    end: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Panel:
    """One metric on one dataset."""

    metric: str
    data: str
    n: int | None
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    height: float


@dataclass(frozen=True)
class Headline:
    """`measurements` by evaluation stage, in the recipe's order. `more` panels say how, not how well."""

    panels: tuple[Panel, ...]
    more: tuple[Panel, ...]
    measurements: Mapping[str, tuple[Measurement, ...]]
    notes: tuple[str, ...]


def read_headline(run: Mapping[str, Any], wiring: Wiring, reader: Reader) -> Headline:
    """All evaluations of the run; from the run's record where results.json cannot be read."""
    measurements: dict[str, tuple[Measurement, ...]] = {}
    for stage, entry in run["stages"].items():
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] != "evaluation":
                continue
            results = reader.json(artifact_of(output), "results.json", stage, expected=True)
            if not results and entry.get("metrics"):
                results = with_intervals(entry["metrics"])
                reader.note(f"{stage}: its numbers are those in the record of the run")
            measurements[stage] = _measurements(stage, results, wiring, reader)
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for found in measurements.values():
        for measurement in found:
            groups.setdefault((measurement.metric, measurement.data), []).append(measurement)
    panels = [_panel(members) for members in groups.values()]
    return Headline(
        panels=tuple(panel for panel in panels if not panel.metric.startswith(SECONDARY)),
        more=tuple(panel for panel in panels if panel.metric.startswith(SECONDARY)),
        measurements=measurements,
        notes=tuple(reader.notes),
    )


def _measurements(stage: str, results: Mapping[str, Any], wiring: Wiring, reader: Reader) -> tuple[Measurement, ...]:
    model, data = wiring.model_of(stage) or stage, wiring.data_of(stage)
    found = []
    for metric, result in results.items():
        fields = result if isinstance(result, Mapping) else {"value": result}
        value = _finite(fields.get("value"))
        if value is None:
            if isinstance(result, Mapping):
                reader.note(f"{stage}: {metric} has no finite value")
            continue
        n = fields.get("n")
        low, high = _finite(fields.get("low")), _finite(fields.get("high"))
        found.append(Measurement(stage, model, data, metric, value, low, high, n if isinstance(n, int) else None))
    return tuple(found)


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < float("inf") else None


def _panel(members: Sequence[Measurement]) -> Panel:
    """Bars start at zero; an axis of shares always runs to one, so that panels compare."""
    edges = [edge for m in members for edge in (m.value, m.low, m.high) if edge is not None]
    low, high = min(0.0, *edges), max(0.0, *edges)
    if low == 0 and high <= 1:
        high = 1.0
    marks = ticks(low, high)
    first, last = min(marks[0], low), max(marks[-1], high)

    def x(value: float) -> float:
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    bars = tuple(
        Bar(
            of=member,
            y=TOP + ROW * index,
            start=min(x(0), x(member.value)),
            end=max(x(0), x(member.value)),
            low=None if member.low is None else x(member.low),
            high=None if member.high is None else x(member.high),
        )
        for index, member in enumerate(members)
    )
    counts = {member.n for member in members}
    return Panel(
        metric=members[0].metric,
        data=members[0].data,
        n=counts.pop() if len(counts) == 1 else None,
        bars=bars,
        ticks=tuple((x(mark), number(mark)) for mark in marks),
        height=TOP + ROW * len(members) + BOTTOM,
    )
