"""`posttrain trace`: from a number of an evaluation to its samples, their sources, and the rows behind the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts import Artifact, Store
from artifacts.errors import RequestError
from flows.ancestry import Ancestry, Node
from flows.reporting.reading import Reader
from flows.row_sources import Place, places, source_row
from stages.evaluate import FIRST_METRICS
from stages.evaluation.scores import LARGE_IS_BAD, VERDICTS, counted, recomputed
from stages.names import nearest

MOST_LINES = 1_000_000
"""Of one file of samples or steps."""
MODELS = ("model", "adapter", "reward_model", "process_reward_model")


@dataclass(frozen=True)
class Training:
    """One training behind the model: its result, and source row -> the steps that trained it."""

    node: Node
    steps: int
    rows: Mapping[str, list[int]]

    @property
    def label(self) -> str:
        return self.node.name or self.node.stage or self.node.identifier[7:19]

    def to_json(self) -> dict[str, Any]:
        names = ("identifier", "kind", "name", "uses", "stage", "run")
        return {**{name: getattr(self.node, name) for name in names}, "steps": self.steps, "rows": len(self.rows)}


@dataclass(frozen=True)
class Row:
    """A row of the sources: where it lies, and training -> the steps that trained it."""

    row_id: str
    place: Place | None
    trained: Mapping[str, list[int]]

    def to_json(self) -> dict[str, Any]:
        return {
            "row_id": self.row_id,
            "source": None if self.place is None else vars(self.place),
            "trained": self.trained,
        }


@dataclass(frozen=True)
class Sample:
    """One sample that counts in the number, its value in it, and its row."""

    record: Mapping[str, Any]
    value: float
    row: Row

    def to_json(self) -> dict[str, Any]:
        return {**self.row.to_json(), "row_id": self.record["row_id"], "value": self.value, "sample": dict(self.record)}


@dataclass(frozen=True)
class Trace:
    """A number with its interval, what it is made of again, and what is behind it."""

    evaluation: Node
    metric: str
    value: float
    low: float | None
    high: float | None
    recomputed: float | None
    counted: int
    matching: int
    """Samples of those counted that are as asked for; `samples` has the first of them."""
    samples: tuple[Sample, ...]
    trainings: tuple[Training, ...]
    rows: tuple[Row, ...]
    """Behind the model, where they were asked for: the first of `rows_behind`."""
    rows_behind: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def agrees(self) -> bool | None:
        """Whether the samples give the number; None: they do not tell."""
        return (
            None if self.recomputed is None else math.isclose(self.recomputed, self.value, rel_tol=1e-9, abs_tol=1e-12)
        )

    def to_json(self) -> dict[str, Any]:
        """For `posttrain trace --json`."""
        names = ("metric", "value", "low", "high", "recomputed", "agrees", "notes")
        numbers = ("counted", "matching", "rows_behind")
        return {
            "evaluation": self.evaluation.identifier,
            "inputs": {node.role: node.identifier for node in self.evaluation.below},
            **{name: getattr(self, name) for name in (*names, *numbers)},
            "trainings": [training.to_json() for training in self.trainings],
            "samples": [sample.to_json() for sample in self.samples],
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True)
class Wanted:
    """Which samples to show: by verdict, by the beginning of the row id, and how many (0: all)."""

    wrong: bool = False
    right: bool = False
    row: str | None = None
    limit: int = 10
    training_rows: bool = False


def trace(store: Store, artifact: Artifact, metric: str | None, wanted: Wanted) -> Trace:
    """Of an evaluation. Raises RequestError for another kind of artifact, or a metric that it does not have."""
    if artifact.kind != "evaluation":
        raise RequestError(f"{artifact.id} is a {artifact.kind}; a score is of an artifact of kind evaluation")
    ancestry = Ancestry(store)
    root, reader = ancestry.down(artifact), ancestry.reader
    results = reader.json(artifact, "results.json", "evaluation", expected=True)
    name = _metric(results, metric)
    records = list(reader.lines(artifact, "samples.jsonl", "evaluation", MOST_LINES))
    found = counted(name, records)
    matching = _matching(name, found, wanted)
    chosen = matching[: wanted.limit or None]
    trainings = tuple(_trainings(root, reader))
    behind = _order(trainings) if wanted.training_rows else []
    shown = {str(record["row_id"]) for record, _ in chosen} | set(behind[: wanted.limit or None])
    look_up = _rows(shown, root, trainings)
    measured = results[name] if isinstance(results[name], Mapping) else {"value": results[name]}
    return Trace(
        evaluation=root,
        metric=name,
        value=float(measured["value"]),
        low=measured.get("low"),
        high=measured.get("high"),
        recomputed=recomputed(name, records),
        counted=len(found),
        matching=len(matching),
        samples=tuple(Sample(record, value, look_up(str(record["row_id"]))) for record, value in chosen),
        trainings=trainings,
        rows=tuple(look_up(row_id) for row_id in behind[: wanted.limit or None]),
        rows_behind=len(behind),
        notes=tuple(reader.notes),
    )


def _metric(results: Mapping[str, Any], metric: str | None) -> str:
    if not results:
        raise RequestError("the evaluation's results.json cannot be read; `posttrain verify` says more")
    if metric is None:
        return next((name for name in FIRST_METRICS if name in results), next(iter(results)))
    if metric not in results:
        raise RequestError(
            f"the evaluation has no metric {metric!r}{nearest(metric, results)}; it has: {', '.join(results)}"
        )
    return metric


def _matching(
    metric: str, found: list[tuple[Mapping[str, Any], float]], wanted: Wanted
) -> list[tuple[Mapping[str, Any], float]]:
    if (wanted.wrong or wanted.right) and metric not in VERDICTS:
        raise RequestError(
            f"samples of {metric} are neither right nor wrong; --wrong and --right are for {' and '.join(VERDICTS)}"
        )
    kept = [
        (record, value)
        for record, value in found
        if (wanted.row is None or str(record["row_id"]).startswith(wanted.row))
        and (not wanted.wrong or value < 1)
        and (not wanted.right or value >= 1)
    ]
    # wrong before right; for other metrics, the worst first
    kept.sort(key=lambda pair: -pair[1] if metric in LARGE_IS_BAD else pair[1])
    return kept


def _trainings(root: Node, reader: Reader) -> Iterable[Training]:
    """Everything behind the evaluation that was trained, the last training first."""
    for node in root.walk():
        if node.kind not in MODELS or node.repeated:
            continue
        artifact = Artifact.of(node.kind, node.identifier)
        rows: dict[str, list[int]] = {}
        steps = 0
        for line in reader.lines(artifact, "steps.jsonl", node.name or node.stage or node.kind, MOST_LINES):
            steps += 1
            for row_id in line["rows"]:
                trained = rows.setdefault(source_row(str(row_id)) or str(row_id), [])
                if line["step"] not in trained:
                    trained.append(line["step"])
        if steps:
            yield Training(node, steps, rows)


def _order(trainings: Iterable[Training]) -> list[str]:
    """Rows behind the model: those of the last training first, by the step at which they came."""
    return list(dict.fromkeys(row_id for training in trainings for row_id in training.rows))


def _rows(shown: set[str], root: Node, trainings: Iterable[Training]) -> Callable[[str], Row]:
    sources = [source for node in root.walk() for source in node.sources]
    known = places({base for row_id in shown if (base := source_row(row_id)) is not None}, sources)

    def look_up(row_id: str) -> Row:
        base = source_row(row_id) or row_id
        trained = {training.label: training.rows[base] for training in trainings if base in training.rows}
        return Row(base, known.get(base), trained)

    return look_up
