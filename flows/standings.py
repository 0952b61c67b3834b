"""Runs in a table: the settings in which they differ, the metrics that they are judged by, and how they ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.closing import main_name
from flows.entries import BROKEN
from flows.trial import Ranking

Payload = Mapping[str, Any]
COUNTED = ("cached", "ran", *BROKEN)
"""States of stages that had their turn."""


@dataclass(frozen=True)
class Measured:
    """A metric of a run, with its interval where it has one."""

    value: Any
    low: float | None = None
    high: float | None = None

    @property
    def number(self) -> float | None:
        """None: it cannot be ranked by."""
        known = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return float(self.value) if known and math.isfinite(self.value) else None


@dataclass(frozen=True)
class Row:
    """One run. `metrics`: STAGE.METRIC -> its number. `trial`: its number in a sweep."""

    state: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Measured] = field(default_factory=dict)
    trial: int | None = None
    run: str | None = None
    seconds: float | None = None
    cached: int = 0
    stages: int = 0
    """How many had their turn."""
    error: str | None = None
    command: str | None = None
    """What runs the recipe as the trial did."""

    def to_json(self) -> dict[str, Any]:
        """`low` and `high` where there is an interval."""
        metrics = {
            name: {key: value for key, value in vars(found).items() if value is not None}
            for name, found in self.metrics.items()
        }
        return {**vars(self), "settings": dict(self.settings), "metrics": metrics}


@dataclass(frozen=True)
class Standings:
    """Rows, best first where `best` says which end of the first metric is: `highest` or `lowest`."""

    settings: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    best: str | None = None
    same: tuple[str, ...] = ()
    """Metrics that are equal in all rows."""

    @property
    def first(self) -> Row | None:
        """The best of those that ended well."""
        if self.best is None or not self.rows:
            return None
        first = self.rows[0]
        return first if first.state == "ok" and _value(first, self.metrics) is not None else None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "settings": list(self.settings),
            "metrics": list(self.metrics),
            "same": list(self.same),
            "best": self.best,
            "rows": [row.to_json() for row in self.rows],
        }


def row_of(payload: Payload, settings: Mapping[str, Any], metrics: Iterable[str]) -> Row:
    """A run with the metrics named `STAGE.METRIC` that it has."""
    trial = payload.get("sweep") or {}
    entries = payload["stages"].values()
    return Row(
        state=str(payload["state"]),
        settings=settings,
        metrics={name: found for name in metrics if (found := measured(payload, name)) is not None},
        trial=trial.get("trial"),
        run=str(payload["run"]),
        seconds=payload.get("seconds"),
        cached=sum(entry["state"] == "cached" for entry in entries),
        stages=sum(entry["state"] in COUNTED for entry in entries),
        error=error_of(payload),
        command=trial.get("command"),
    )


def measured(payload: Payload, name: str) -> Measured | None:
    """The metric `STAGE.METRIC` of a run; None: it has none."""
    stage, _, metric = name.partition(".")
    metrics = (payload["stages"].get(stage) or {}).get("metrics") or {}
    if metric not in metrics:
        return None
    return Measured(metrics[metric], metrics.get(f"{metric}/low"), metrics.get(f"{metric}/high"))


def error_of(payload: Payload) -> str | None:
    """The first stage that went wrong, with its error."""
    broken = ((name, entry) for name, entry in payload["stages"].items() if entry.get("error"))
    return next((f"{name}: {entry['error']}" for name, entry in broken), None)


def judged_by(ranking: Ranking, payloads: Iterable[Payload]) -> str | None:
    """STAGE.METRIC; None: no run has any metric of the stage yet."""
    if ranking.metric is not None:
        return f"{ranking.stage}.{ranking.metric}"
    for payload in payloads:
        entry = payload["stages"].get(ranking.stage)
        if entry and entry.get("metrics") and (name := main_name(entry)) is not None:
            return f"{ranking.stage}.{name}"
    return None


def ranked(ranking: Ranking, metric: str | None, rows: Sequence[Row], settings: Sequence[str]) -> Standings:
    """Best first; those without the metric after them, those that did not end well last; equal ones as they were."""
    if metric is None:
        return Standings(tuple(settings), (), tuple(rows))
    lowest = ranking.lowest_first(metric.partition(".")[2])

    def key(row: Row) -> tuple[bool, bool, float]:
        value = _value(row, (metric,))
        return row.state != "ok", value is None, 0.0 if value is None else value if lowest else -value

    return Standings(tuple(settings), (metric,), tuple(sorted(rows, key=key)), "lowest" if lowest else "highest")


def _value(row: Row, metrics: Sequence[str]) -> float | None:
    found = row.metrics.get(metrics[0]) if metrics else None
    return None if found is None else found.number
