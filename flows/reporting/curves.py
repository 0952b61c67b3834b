"""Training curves: metrics.jsonl of every model a run made, and what unfinished stages logged; one row a metric, runs
of a kind in one chart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flows.reporting.charts import MAX_POINTS, Chart, Point, line_chart
from flows.reporting.ledgers import counts_of
from flows.reporting.reading import TRAINED, Reader, artifact_of
from flows.reporting.unfinished import Unfinished, is_unfinished, metrics_so_far
from stages.monitors import notices_of, notices_of_rows

MAX_ROWS = 200_000
COLORS = 8
NOT_CURVES = frozenset({"step", "epoch", "num_tokens"})
"""Counters; they grow by themselves."""

LEADING = (
    "loss",
    "eval/loss",
    "reward",
    "eval/reward",
    "rewards/margins",
    "rewards/accuracies",
    "accuracy",
    "eval/accuracy",
    "kl",
    "entropy",
    "mean_token_accuracy",
    "completions/mean_length",
    "grad_norm",
    "learning_rate",
)
"""Shown first and open, in this order; the others follow folded."""


@dataclass(frozen=True)
class Panel:
    """One chart: one metric of the stages of one kind (`uses`)."""

    metric: str
    uses: str
    chart: Chart


@dataclass(frozen=True)
class Block:
    """Charts that stand together: one metric of several kinds of stages, or metrics of one kind each."""

    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Curves:
    """`leading` is shown, `more` (`folded` metrics) is folded."""

    leading: tuple[Block, ...]
    more: tuple[Block, ...]
    folded: int
    notices: tuple[tuple[str, str], ...]
    """(stage, what a monitor noticed)"""
    unfinished: tuple[Unfinished, ...]
    notes: tuple[str, ...]

    @property
    def partial(self) -> frozenset[str]:
        """Stages whose lines end where these failed, or as far as they are."""
        return frozenset(found.stage for found in self.unfinished)


@dataclass(frozen=True)
class _Log:
    stage: str
    uses: str
    color: int
    metrics: Mapping[str, Sequence[Point]]
    notices: tuple[str, ...]


def read_curves(run: Mapping[str, Any], reader: Reader) -> Curves:
    """Every curve of the run; what could not be read is in `notes`."""
    entries = run["stages"].items()
    unfinished = tuple(
        metrics_so_far(run, stage, entry, reader, MAX_ROWS) for stage, entry in entries if is_unfinished(entry)
    )
    logs = _logs(run, reader, {found.stage: found.rows for found in unfinished})
    names = sorted({name for log in logs for name in log.metrics}, key=rank)
    rows = {name: panels for name in names if (panels := _panels(name, logs))}
    for panel in (panel for panels in rows.values() for panel in panels):
        for series in panel.chart.series:
            if series.thinned:
                reader.note(
                    f"{series.name}: curves are thinned to at most {MAX_POINTS:,} of {series.count:,} points "
                    "(first, last, and the lowest and highest of every stretch are kept)"
                )
            if series.missing:
                reader.note(f"{series.name}: {series.missing:,} values of {panel.metric} are not finite numbers")
    folded = [panels for name, panels in rows.items() if name not in LEADING]
    return Curves(
        leading=_blocks(panels for name, panels in rows.items() if name in LEADING),
        more=_blocks(folded),
        folded=len(folded),
        notices=tuple((log.stage, notice) for log in logs for notice in log.notices),
        unfinished=unfinished,
        notes=tuple(reader.notes),
    )


def _blocks(rows: Iterable[tuple[Panel, ...]]) -> tuple[Block, ...]:
    """A block for every metric of several kinds of stages; neighbours that have one chart each share one."""
    blocks: list[Block] = []
    for several, group in groupby(rows, key=lambda panels: len(panels) > 1):
        if several:
            blocks += [Block(panels) for panels in group]
        else:
            blocks.append(Block(tuple(panel for panels in group for panel in panels)))
    return tuple(blocks)


def rank(name: str) -> tuple[int, str]:
    """Where a metric stands among the curves."""
    return (LEADING.index(name) if name in LEADING else len(LEADING), name)


def _logs(run: Mapping[str, Any], reader: Reader, so_far: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[_Log]:
    """`so_far`: the rows of unfinished stages."""
    logs: list[_Log] = []

    def add(stage: str, rows: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any]) -> None:
        notices = (*map(str, notices_of_rows(counts_of(ledger))), *_notices(rows))
        uses = str(run["stages"][stage]["uses"])
        logs.append(_Log(stage, uses, len(logs) % COLORS, points_of(rows), notices))

    for stage, entry in run["stages"].items():
        if so_far.get(stage):
            add(stage, so_far[stage], {})
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] in TRAINED:
                rows = list(reader.lines(artifact_of(output), "metrics.jsonl", stage, MAX_ROWS))
                if points_of(rows):
                    add(stage, rows, reader.json(artifact_of(output), "ledger.json", stage))
    return logs


def _notices(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the monitors say of the numbers in the rows."""
    numbers = [
        {"step": line}
        | {name: value for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for line, row in enumerate(rows, start=1)
    ]
    return tuple(str(notice) for notice in notices_of(numbers))


def points_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Metric -> points; rows without a step are numbered by their line."""
    points: dict[str, list[Point]] = {}
    for line, row in enumerate(rows, start=1):
        step = row.get("step")
        at = float(step) if isinstance(step, int | float) and math.isfinite(step) else float(line)
        for name, value in row.items():
            if name in NOT_CURVES or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            finite = value is not None and math.isfinite(value)
            points.setdefault(name, []).append((at, value if finite else None))
    return points


def _panels(metric: str, logs: Sequence[_Log]) -> tuple[Panel, ...]:
    kinds: dict[str, list[tuple[str, int, Sequence[Point]]]] = {}
    for log in logs:
        points = log.metrics.get(metric, ())
        if any(value is not None for _, value in points):
            kinds.setdefault(log.uses, []).append((log.stage, log.color, points))
    return tuple(Panel(metric, uses, line_chart(lines)) for uses, lines in kinds.items())
