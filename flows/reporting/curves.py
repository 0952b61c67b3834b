"""Training curves: metrics.jsonl of every model a run made, and what unfinished stages logged; kind by kind, the stages
of a kind in one chart a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.reporting.charts import MAX_POINTS, Chart, Point, line_chart
from flows.reporting.ledgers import counts_of
from flows.reporting.meanings import meaning
from flows.reporting.reading import TRAINED, Reader, artifact_of
from flows.reporting.unfinished import Unfinished, is_unfinished, metrics_so_far
from stages.monitors import Notice, notices_of, notices_of_rows
from stages.stage import STAGES, load_stage

MAX_ROWS = 200_000
COLORS = 8
POINTS, FEWEST_POINTS = 40_000, 150
"""Of all curves of a page together, and of one of many."""
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
    "mean_token_accuracy",
    "kl",
    "entropy",
    "completions/mean_length",
    "grad_norm",
    "learning_rate",
)
"""Shown first, in this order."""
OPEN, OPEN_ALONE = 3, 6
"""Charts of a kind of stages that are open, a row of them; and where there is no other kind."""


@dataclass(frozen=True)
class Panel:
    """One chart: one metric of the stages of one kind (`uses`)."""

    metric: str
    uses: str
    chart: Chart
    meaning: str = ""


@dataclass(frozen=True)
class Kind:
    """The charts of the stages of one kind: `leading` are open, `more` are folded."""

    uses: str
    stages: tuple[str, ...]
    leading: tuple[Panel, ...]
    more: tuple[Panel, ...]


@dataclass(frozen=True)
class Curves:
    """`notices`: (stage, what a monitor noticed)."""

    kinds: tuple[Kind, ...]
    notices: tuple[tuple[str, Notice], ...]
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
    notices: tuple[Notice, ...]


def read_curves(run: Mapping[str, Any], reader: Reader) -> Curves:
    """Every curve of the run; what could not be read is in `notes`."""
    entries = run["stages"].items()
    unfinished = tuple(
        metrics_so_far(run, stage, entry, reader, MAX_ROWS) for stage, entry in entries if is_unfinished(entry)
    )
    logs = _logs(run, reader, {found.stage: found.rows for found in unfinished})
    limit = _points_of_a_line(logs)
    kinds = tuple(_kinds(logs, limit))
    for panel in (panel for kind in kinds for panel in (*kind.leading, *kind.more)):
        for series in panel.chart.series:
            if series.thinned:
                reader.note(
                    f"curves of more than {limit:,} points are thinned to so many: first, last, and the lowest and "
                    "highest of every stretch are kept"
                )
            if series.missing:
                reader.note(f"{series.name}: {series.missing:,} values of {panel.metric} are not finite numbers")
    return Curves(
        kinds=kinds,
        notices=tuple((log.stage, notice) for log in logs for notice in log.notices),
        unfinished=unfinished,
        notes=tuple(reader.notes),
    )


def _points_of_a_line(logs: Sequence[_Log]) -> int:
    """The more curves a page has, the fewer each: it is to stay a page that can be sent."""
    return max(FEWEST_POINTS, min(MAX_POINTS, POINTS // max(1, sum(len(log.metrics) for log in logs))))


def _kinds(logs: Sequence[_Log], limit: int) -> Iterator[Kind]:
    by_uses: dict[str, list[_Log]] = {}
    for log in logs:
        by_uses.setdefault(log.uses, []).append(log)
    count = OPEN if len(by_uses) > 1 else OPEN_ALONE
    for uses, alike in by_uses.items():
        main = load_stage(uses).main_metric if uses in STAGES else None
        first = (f"eval/{main}", main)  # what the stage is judged by
        names = {name for log in alike for name in log.metrics}
        ordered = sorted(names, key=lambda name: (name not in first, rank(name)))
        panels = _new_first([panel for name in ordered if (panel := _panel(name, uses, alike, limit)) is not None])
        yield Kind(uses, tuple(log.stage for log in alike), tuple(panels[:count]), tuple(panels[count:]))


def _new_first(panels: Sequence[Panel]) -> list[Panel]:
    """Those whose lines another one before has (a loss of one term, and that term) are last."""
    drawn: set[tuple[str, ...]] = set()
    new: list[Panel] = []
    again: list[Panel] = []
    for panel in panels:
        lines = tuple(series.points_json for series in panel.chart.series)
        (again if lines in drawn else new).append(panel)
        drawn.add(lines)
    return [*new, *again]


def rank(name: str) -> tuple[int, str]:
    """Where a metric stands among the curves."""
    return (LEADING.index(name) if name in LEADING else len(LEADING), name)


def _logs(run: Mapping[str, Any], reader: Reader, so_far: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[_Log]:
    """`so_far`: the rows of unfinished stages."""
    logs: list[_Log] = []

    def add(stage: str, rows: Sequence[Mapping[str, Any]], ledger: Mapping[str, Any]) -> None:
        notices = (*notices_of_rows(counts_of(ledger)), *_notices(rows))
        uses = str(run["stages"][stage]["uses"])
        logs.append(_Log(stage, uses, _color(logs, uses), points_of(rows), notices))

    for stage, entry in run["stages"].items():
        if so_far.get(stage):
            add(stage, so_far[stage], {})
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] in TRAINED:
                rows = list(reader.lines(artifact_of(output), "metrics.jsonl", stage, MAX_ROWS))
                if points_of(rows):
                    add(stage, rows, reader.json(artifact_of(output), "ledger.json", stage))
    return logs


def _color(logs: Sequence[_Log], uses: str) -> int:
    """The next one, or the first after it that no other of its charts' lines has, while there is one."""
    taken = {log.color for log in logs if log.uses == uses}
    after = [(len(logs) + step) % COLORS for step in range(COLORS)]
    return next((color for color in after if color not in taken), after[0])


def _notices(rows: Iterable[Mapping[str, Any]]) -> tuple[Notice, ...]:
    """What the monitors say of the numbers in the rows."""
    numbers = [
        {"step": line}
        | {name: value for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for line, row in enumerate(rows, start=1)
    ]
    return tuple(notices_of(numbers))


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


def _panel(metric: str, uses: str, logs: Sequence[_Log], limit: int) -> Panel | None:
    """None: no stage has a finite number of it."""
    found = [(log.stage, log.color, log.metrics.get(metric, ())) for log in logs]
    lines = [line for line in found if any(value is not None for _, value in line[2])]
    return Panel(metric, uses, line_chart(lines, limit, smooth=True), meaning(metric, uses)) if lines else None
