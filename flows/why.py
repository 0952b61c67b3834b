"""`posttrain why`: why a stage will run, ran or was cached, followed back to where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from artifacts import Record, Store
from artifacts.errors import RequestError
from flows.causes import Cause, roots, to_json
from flows.entries import BROKEN
from flows.history import Comparison, History, Step
from flows.inputs import StageOutput, input_digests
from flows.plan import Plan
from flows.reporting.wiring import read_wiring
from flows.written import named
from stages.identity import identity
from stages.names import nearest

_STATES = {"run": "will run", "may_run": "may run", "resume": "will resume"}


@dataclass(frozen=True)
class Why:
    """The answer for one stage. `run`: the run that it is about; None: the next one.

    `compared_with`: the run that made the record which the causes are differences from. Of a cached stage the causes
    are those of the run that made it.
    """

    stage: str
    uses: str
    state: str
    words: str
    run: str | None
    recipe: str
    fingerprint: str | None
    made_by: str | None
    compared_with: str | None
    causes: tuple[Cause, ...]

    @property
    def roots(self) -> tuple[Cause, ...]:
        """Where it begins."""
        return roots(self.causes)

    def to_json(self) -> dict[str, Any]:
        """For `posttrain why --json`."""
        names = ("stage", "uses", "state", "words", "run", "recipe", "fingerprint", "made_by", "compared_with")
        return {
            **{name: getattr(self, name) for name in names},
            "causes": to_json(self.causes),
            "roots": [{"stage": root.stage, "text": root.text} for root in self.roots],
        }


def why_in_plan(plan: Plan, name: str) -> Why:
    """Why a stage would be run, or would not, by `posttrain run` now. Raises RequestError for an unknown stage."""
    _require(name, plan.recipe.stages, f"recipe {plan.recipe.name}")
    decision, explainer = plan.decisions[name], _OfPlan(plan)
    record = decision.record
    if record is not None:
        found = explainer.history.compare(name, record.identity, before=record)
        causes, words = _causes(name, found), _done(record)
    else:
        found, causes = explainer.compare(name), explainer.causes(name)
        words = f"at step {decision.step}" if decision.step is not None else ""
    return Why(
        stage=name,
        uses=plan.recipe.stages[name].uses.name,
        state=decision.state,
        words="; ".join(decision.reasons) if decision.state == "skipped" else words,
        run=None,
        recipe=plan.recipe.name,
        fingerprint=decision.fingerprint,
        made_by=_run_of(record),
        compared_with=_run_of(found.record),
        causes=causes,
    )


def why_in_run(store: Store, run: Mapping[str, Any], name: str) -> Why:
    """Why a stage was run, or was not, in a run of the past (`which_run.read_run`)."""
    _require(name, run["stages"], f"run {run['run']}")
    entry, wiring = run["stages"][name], read_wiring(run)
    steps = {}
    for stage, other in run["stages"].items():
        sources: dict[str, tuple[str | None, ...]] = {}
        for wire in wiring.wires[stage]:
            sources[wire.name] = (*sources.get(wire.name, ()), wire.source)
        settings = wiring.settings.get(stage, {}).get("with") or {}
        steps[stage] = Step(stage, str(other["uses"]), sources, settings, named(settings))
    history = History(str(run["recipe"]), steps, store)
    record = record_of(store, run, entry)
    found = Comparison(None, ()) if record is None else history.compare(name, record.identity, before=record)
    causes = _causes(name, found)
    known = record is None or (found.record is not None and not found.causes)
    if known or "forced" in entry["reasons"]:  # what differs from older records is not why
        causes = tuple(Cause(name, text) for text in entry["reasons"]) if entry["state"] != "cached" else ()
    return Why(
        stage=name,
        uses=str(entry["uses"]),
        state=str(entry["state"]),
        words=_done(record) if record is not None and entry["state"] == "cached" else _outcome(entry),
        run=str(run["run"]),
        recipe=str(run["recipe"]),
        fingerprint=entry["fingerprint"],
        made_by=_run_of(record),
        compared_with=_run_of(found.record),
        causes=causes,
    )


class _OfPlan:
    """Causes of the decisions of a plan; stages that wait for others bring the causes of those along."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.history = History.of(plan.recipe, plan.store)
        self._causes: dict[str, tuple[Cause, ...]] = {}

    def compare(self, name: str) -> Comparison:
        """With what is known of the inputs."""
        decision, stage = self.plan.decisions[name], self.plan.recipe.stages[name]
        if decision.state == "skipped":
            return Comparison(None, ())
        many = {input_name: declared.many for input_name, declared in stage.uses.inputs.items()}
        known = decision.identity or identity(
            stage.uses, stage.config, input_digests(decision.inputs, many), self.plan.outside.content
        )
        return self.history.compare(name, known)

    def causes(self, name: str) -> tuple[Cause, ...]:
        """Empty for a stage that is cached or skipped."""
        if name not in self._causes:
            self._causes[name] = self._find(name)
        return self._causes[name]

    def _find(self, name: str) -> tuple[Cause, ...]:
        decision, stage = self.plan.decisions[name], self.plan.recipe.stages[name]
        if decision.state in ("cached", "skipped"):
            return ()
        if "forced" in decision.reasons:
            own: tuple[Cause, ...] = (Cause(name, "forced by --force"),)
        elif decision.fallen is not None:
            own = (Cause(name, decision.fallen),)
        elif decision.fingerprint is not None and (lost := self.history.lost(name, decision.fingerprint)):
            own = (Cause(name, lost),)
        else:
            own = () if decision.state == "may_run" else _causes(name, self.compare(name))
        if decision.state == "resume":
            own = (*own, Cause(name, decision.reasons[-1]))
        if History.FIRST in decision.reasons:  # whatever its inputs turn out to be
            return own
        waits = {
            (input_name, reference.stage): None
            for input_name, entries in stage.inputs.items()
            for reference in entries
            if isinstance(reference, StageOutput) and self.plan.decisions[reference.stage].record is None
        }
        return own + tuple(self._waiting(name, input_name, source) for input_name, source in waits)

    def _waiting(self, name: str, input_name: str, source: str) -> Cause:
        state = _STATES.get(self.plan.decisions[source].state, self.plan.decisions[source].state)
        behind = Cause(source, state, because=self.causes(source))
        return Cause(name, f"input {input_name} may change", because=(behind,))


def _causes(name: str, found: Comparison) -> tuple[Cause, ...]:
    return (Cause(name, History.FIRST),) if found.record is None else found.causes


def _outcome(entry: Mapping[str, Any]) -> str:
    """How a stage of a run ended, or that its turn is to come."""
    if entry["state"] == "ran":
        return f"in {entry['seconds']:.1f} s"
    return str(entry["error"] if entry["state"] in BROKEN else entry["reason"])


def _done(record: Record) -> str:
    """`done by run 20261122-211652-adc113 on 2026-11-22 21:17 in 25.6 s`"""
    when, seconds = record.provenance.get("finished_at"), record.timings.get("seconds")
    at = f" on {datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC" if isinstance(when, int | float) else ""
    took = f" in {seconds:.1f} s" if isinstance(seconds, int | float) else ""
    return f"done by run {_run_of(record)}{at}{took}"


def _run_of(record: Record | None) -> str | None:
    return None if record is None else str(record.provenance.get("run", "unknown"))


def record_of(store: Store, run: Mapping[str, Any], entry: Mapping[str, Any]) -> Record | None:
    """The record of what a stage of a run made or took; None: there is none (any more)."""
    if not entry.get("fingerprint"):
        return None
    made = {name: str(output["id"]) for name, output in entry["outputs"].items()}
    records = store.records(str(entry["uses"]), str(entry["fingerprint"]))
    same = [record for record in records if {name: found.id for name, found in record.outputs.items()} == made]
    by_run = {record.provenance.get("run"): record for record in reversed(same)}
    taken = next((record for name, record in by_run.items() if str(name) in str(entry["reason"])), None)
    return by_run.get(run["run"]) or taken or next(iter(same), None)


def _require(name: str, stages: Mapping[str, Any], where: str) -> None:
    if name not in stages:
        raise RequestError(f"{where} has no stage {name!r}{nearest(name, stages)}; there are: {', '.join(stages)}")
