"""Training curves of a sweep: the models that differ between trials, one line each, the best trial's first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.reporting.charts import MAX_POINTS, Point, line_chart
from flows.reporting.curves import COLORS, LEADING, MAX_ROWS, Panel, points_of, rank
from flows.reporting.reading import TRAINED, Reader, artifact_of
from flows.reporting.unfinished import is_unfinished, metrics_so_far

POINTS_OF_A_CHART = 4_000
"""Of all its lines together; a line has 100 of them at least."""
ALWAYS_SHOWN = ("loss", "eval/loss", "reward", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class StageCurves:
    """One stage. `best`: the name of the line that the best trial is in; `partial`: lines of unfinished stages."""

    stage: str
    uses: str
    leading: tuple[Panel, ...]
    more: tuple[Panel, ...]
    best: str
    partial: frozenset[str]


@dataclass(frozen=True)
class SweepCurves:
    """`same`: stages that trained one model for all trials."""

    stages: tuple[StageCurves, ...]
    same: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    trials: tuple[int, ...]
    metrics: Mapping[str, Sequence[Point]]
    partial: bool

    @property
    def name(self) -> str:
        return f"trial{'s' if len(self.trials) > 1 else ''} {', '.join(map(str, self.trials))}"


def read_sweep_curves(runs: Sequence[Mapping[str, Any]], metric: str | None, reader: Reader) -> SweepCurves:
    """`runs`: payloads of trials, best first. `metric`: the name of what they are judged by, which is shown first."""
    found, same = [], []
    for stage in dict.fromkeys(name for run in runs for name in run["stages"]):
        made = _models(runs, stage)
        lines = list(_lines(made, stage, reader))
        if len(made) == 1 and len(runs) > 1:
            same += [stage] if lines else []
        elif lines:
            uses = next(str(run["stages"][stage]["uses"]) for run in runs if stage in run["stages"])
            found.append(_curves(stage, uses, lines, metric))
    return SweepCurves(tuple(found), tuple(same), tuple(reader.notes))


def _models(runs: Sequence[Mapping[str, Any]], stage: str) -> dict[str, list[Mapping[str, Any]]]:
    """What tells models apart -> the runs that have it: the model's id, or of an unfinished one its run."""
    made: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        entry = run["stages"].get(stage)
        if entry is None:
            continue
        trained = [output for output in (entry.get("outputs") or {}).values() if output["kind"] in TRAINED]
        if trained:
            made.setdefault(str(trained[0]["id"]), []).append(run)
        elif is_unfinished(entry):
            made.setdefault(str(run["run"]), []).append(run)
    return made


def _lines(made: Mapping[str, Sequence[Mapping[str, Any]]], stage: str, reader: Reader) -> Iterator[_Line]:
    for runs in made.values():
        entry = runs[0]["stages"][stage]
        trained = [output for output in (entry.get("outputs") or {}).values() if output["kind"] in TRAINED]
        label = f"{stage} of trial {runs[0]['sweep']['trial']}"
        if trained:
            rows = list(reader.lines(artifact_of(trained[0]), "metrics.jsonl", label, MAX_ROWS))
        else:
            rows = list(metrics_so_far(runs[0], stage, entry, reader, MAX_ROWS).rows)
        if metrics := points_of(rows):
            yield _Line(tuple(sorted(int(run["sweep"]["trial"]) for run in runs)), metrics, not trained)


def _curves(stage: str, uses: str, lines: Sequence[_Line], metric: str | None) -> StageCurves:
    names = sorted({name for line in lines for name in line.metrics}, key=rank)
    judged = [name for name in (metric, f"eval/{metric}") if name in names]
    first = [*judged, *(name for name in names if name in ALWAYS_SHOWN and name not in judged)]
    first = first or [name for name in names if name in LEADING][:1] or names[:1]
    return StageCurves(
        stage,
        uses,
        leading=tuple(_panels(first, uses, lines)),
        more=tuple(_panels([name for name in names if name not in first], uses, lines)),
        best=lines[0].name,
        partial=frozenset(line.name for line in lines if line.partial),
    )


def _panels(names: Sequence[str], uses: str, lines: Sequence[_Line]) -> Iterator[Panel]:
    """Each trial has its colour in all panels; the places after the first ones share one."""
    limit = min(MAX_POINTS, max(100, POINTS_OF_A_CHART // len(lines)))
    for name in names:
        drawn = [
            (line.name, min(place, COLORS), line.metrics[name])
            for place, line in enumerate(lines)
            if any(value is not None for _, value in line.metrics.get(name, ()))
        ]
        if drawn:
            yield Panel(name, uses, line_chart(drawn, limit))
