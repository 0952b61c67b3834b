"""A stage's part of a run's payload: what `posttrain run --json`, the closing table and the report read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from artifacts import Artifact
from artifacts.errors import PosttrainError
from flows.decision import Decision
from flows.recipe import RecipeStage
from flows.stage_result import StageResult, StageStopped

Entry = dict[str, Any]
T = TypeVar("T")
BROKEN = ("failed", "interrupted")
"""States of stages that were at work and gave nothing."""
ENDED_BEFORE = "the run ended before"
"""Why a stage was skipped whose turn never came."""


def entry_of(stage: RecipeStage, decision: Decision, *, state: str, reason: str | None = None) -> Entry:
    """An entry with what the decision knows; a cached stage brings the numbers of the run that made it."""
    record = decision.record
    known = {name: [found.label for found in entries] for name, entries in decision.inputs.items()}
    named = {name: [str(reference) for reference in entries] for name, entries in stage.inputs.items()}
    return {
        "uses": stage.uses.name,
        "state": state,
        "seconds": 0.0,
        "fingerprint": decision.fingerprint,
        "reason": reason if reason is not None else "; ".join(decision.reasons),
        "reasons": list(decision.reasons),
        "inputs": {**named, **known},
        "outputs": in_order(stage, _outputs({} if record is None else record.outputs)),
        "metrics": {} if record is None else dict(record.metrics),
        "timings": {} if record is None else dict(record.timings),
        "counts": {} if record is None else dict(record.counts),
        "command": [] if record is None else list(record.provenance.get("command", [])),
        "error": None,
        "resumed_from": None,
        "earlier_seconds": None,
    }


def ran_entry(
    stage: RecipeStage, decision: Decision, result: StageResult, earlier_seconds: float | None = None
) -> Entry:
    """A stage that a process of this run made. `earlier_seconds`: of attempts before, as far as they are known."""
    return {
        **entry_of(stage, decision, state="ran"),
        "seconds": round(result.seconds, 3),
        "outputs": in_order(stage, result.outputs),
        "metrics": result.metrics,
        "timings": result.timings,
        "counts": result.counts,
        "command": result.command,
        "resumed_from": result.resumed_from,
        "earlier_seconds": None if earlier_seconds is None else round(earlier_seconds, 3),
    }


def failed_entry(stage: RecipeStage, decision: Decision, error: BaseException, seconds: float) -> Entry:
    """A stage that ended with an error, an unforeseen one named by its type, or because the run was ended."""
    interrupted = isinstance(error, StageStopped) or not isinstance(error, Exception)
    words = str(error) if isinstance(error, PosttrainError) else f"{type(error).__name__}: {error}"
    state = "interrupted" if interrupted else "failed"
    return {**_at_work(stage, decision, state), "seconds": round(seconds, 3), "error": words}


def skipped_entry(stage: RecipeStage, decision: Decision, reason: str) -> Entry:
    """A stage that was not run; where its result was there already, the entry names it."""
    return entry_of(stage, decision, state="skipped", reason=reason)


def running_entry(stage: RecipeStage, decision: Decision) -> Entry:
    """A stage that is worked on; how long it takes is not known yet."""
    return {**_at_work(stage, decision, "running"), "seconds": None}


def _at_work(stage: RecipeStage, decision: Decision, state: str) -> Entry:
    """With what the stage was: no record will say it of one that gives nothing."""
    return {**entry_of(stage, decision, state=state), "identity": decision.identity}


def waiting_entry(stage: RecipeStage, decision: Decision) -> Entry:
    """A stage whose turn has not come."""
    return entry_of(stage, decision, state="waiting")


def in_order(stage: RecipeStage, outputs: Mapping[str, T]) -> dict[str, T]:
    """As the stage declares them, the one first that its bare name means; records and results have them in another
    order."""
    order = list(stage.uses.outputs)
    return dict(sorted(outputs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _outputs(outputs: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    return {name: {"kind": found.kind, "id": found.id} for name, found in outputs.items()}
