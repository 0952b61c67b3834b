"""The trials of a sweep as the page lists them: a row each, best first, and below what each was and did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.attempts import state_in_words, total_seconds
from flows.closing import main_metric, metric_in_words
from flows.entries import BROKEN
from flows.reporting.text import duration
from flows.standings import Row, Standings
from flows.standings_table import setting_in_words


@dataclass(frozen=True)
class StageLine:
    """A stage of a trial."""

    name: str
    uses: str
    state: str
    words: str
    time: str
    metric: str


@dataclass(frozen=True)
class Trial:
    """`settings` and `metrics` have the columns of the table; `command` runs the recipe as the trial did."""

    place: int
    number: int
    anchor: str
    best: bool
    row: Row
    settings: tuple[str, ...]
    metrics: tuple[str, ...]
    stages: tuple[StageLine, ...]
    report: str


def read_trials(found: Standings, runs: Sequence[Mapping[str, Any]], store: str) -> tuple[Trial, ...]:
    """In the order of the standings. `store`: its URL, for the commands."""
    by_id = {str(run["run"]): run for run in runs}
    return tuple(_trial(found, place, row, by_id[str(row.run)], store) for place, row in enumerate(found.rows, start=1))


def _trial(found: Standings, place: int, row: Row, run: Mapping[str, Any], store: str) -> Trial:
    measured = [row.metrics.get(name) for name in found.metrics]
    return Trial(
        place=place,
        number=row.trial or 0,
        anchor=f"trial-{row.trial}",
        best=found.first is row,
        row=row,
        settings=tuple(
            setting_in_words(row.settings[name]) if name in row.settings else "–" for name in found.settings
        ),
        metrics=tuple("–" if one is None else metric_in_words(one.value, one.low, one.high) for one in measured),
        stages=tuple(_stage(name, entry) for name, entry in run["stages"].items()),
        report=f"posttrain report {row.run} --store {shlex.quote(store)}",
    )


def _stage(name: str, entry: Mapping[str, Any]) -> StageLine:
    total = total_seconds(entry)
    seconds = entry.get("seconds") if total is None else total
    time = duration(seconds) if entry["state"] in ("ran", *BROKEN) else ""
    metric = main_metric(entry) if entry.get("metrics") else ""
    return StageLine(name, str(entry["uses"]), str(entry["state"]), state_in_words(entry), time, metric)
