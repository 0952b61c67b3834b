"""One run of a recipe: each stage from its decision to its result, and the run's payload. Knows no Prefect.

A stage that is not cached is worked on under the advisory lease of its fingerprint; whoever finds it taken
waits and takes the result.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from artifacts import Artifact, require_shared
from flows.claiming import RunClaim
from flows.decision import Decision
from flows.entries import BROKEN, ENDED_BEFORE, Entry, entry_of, failed_entry, in_order, ran_entry, skipped_entry
from flows.known_failures import KnownFailures
from flows.listener import Listener, Silence
from flows.making import Maker
from flows.moved_aliases import MovedAliases
from flows.plan import Plan
from flows.recipe import RecipeStage
from flows.run_record import RunRecord
from flows.sharing import Occupy, holding, no_slots, renewing
from flows.stage_result import Event
from flows.supervisors import Supervisors
from flows.trial import Trial


@dataclass(frozen=True)
class Outcome:
    """How a stage ended well."""

    cached: bool
    reason: str
    outputs: dict[str, Artifact]


class Run:
    """The state of one run. `execute` may be called from several threads, once for each stage."""

    def __init__(
        self,
        plan: Plan,
        listener: Listener | None = None,
        run_id: str | None = None,
        trial: Trial | None = None,
        failures: KnownFailures | None = None,
    ) -> None:
        """`failures`: what trials beside this one met. Raises RequestError where the processes of stages would not see
        the plan's store."""
        require_shared(plan.store)
        self.plan = plan
        self.trial = trial
        self._failures = failures or KnownFailures()
        self._where = f"trial {trial.number}" if trial else "this run"
        self.recipe = plan.recipe
        self.store = plan.store
        self.listener = listener or Silence()
        self.id = run_id or new_run_id(trial.sweep if trial else None)
        self.supervisors = Supervisors()
        self._maker = Maker(plan, self.id, self.supervisors, self.recipe.parallel * (trial.beside if trial else 1))
        self.claim = RunClaim(plan.store, self.id)
        self._moved = MovedAliases(plan.store, plan.recipe)
        self.entries: dict[str, Entry] = {}
        self.outputs: dict[str, Mapping[str, Artifact]] = {}
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.flow_run_id: str | None = None
        """Prefect's id of the run, once it has one."""
        self._started = time.monotonic()
        self._record = RunRecord(plan, self.id, lambda: {**self.payload(), "flow_run": self.flow_run_id})
        self._final: dict[str, Any] | None = None
        self._interrupted = False
        self._cut_short = False
        """It ended before every stage had its turn, so it is not ok though none failed."""

    def pending(self) -> list[str]:
        """The stages that this run is about, in order; the others are entered as skipped at once."""
        self.claim.add(self.plan.artifacts())
        for name, decision in self.plan.decisions.items():
            if decision.state == "skipped":
                self.outputs[name] = decision.outputs
                self._end(name, skipped_entry(self._stage(name), decision, "; ".join(decision.reasons)))
        self._record.write()
        return [name for name in self.recipe.stages if name not in self.entries]

    def blocked(self, name: str) -> str | None:
        """The stage on which `name` waits in vain, if there is one."""
        for need in self._stage(name).needs:
            entry = self.entries.get(need)
            if entry is not None and entry["state"] in (*BROKEN, "skipped") and not self.outputs.get(need):
                return need
        return None

    def skip(self, name: str, cause: str) -> None:
        """Enter a stage that cannot run because of another one."""
        reason = f"{cause} {self.entries[cause]['state']}"
        self._end(name, skipped_entry(self._stage(name), self.plan.decisions[name], reason))

    def fail(self, name: str, error: BaseException, seconds: float = 0.0, decision: Decision | None = None) -> None:
        """Enter a stage that ended with an error."""
        known = decision or self.plan.decisions[name]
        self._end(name, failed_entry(self._stage(name), known, error, seconds))
        self._record.write()

    def execute(self, name: str, on_event: Callable[[Event], None] | None = None, occupy: Occupy = no_slots) -> Outcome:
        """Take the stage's result from the store or make it. Raises what went wrong, after entering it.

        `occupy` holds the slots of the stage's `launch` while its process works; without, nobody counts them.
        """
        started = time.monotonic()
        decision = self.plan.decisions[name]
        try:
            # what a cached stage reads was cached as well, so in the store nothing can have changed for it
            outside = self._stage(name).uses.stands is not None
            if decision.state != "cached" or outside or not self._renewed(decision):
                decision = self._decided(name)
            if decision.state == "cached":
                return self._take(name, decision)
            with self._lease(name, decision, on_event) as decision:
                if decision.state == "cached":
                    return self._take(name, decision)
                with self._failures.avoided(self._stage(name), decision, self._where):
                    return self._make(name, decision, on_event, occupy)
        except BaseException as error:
            self.fail(name, error, time.monotonic() - started, decision)
            raise

    def payload(self) -> dict[str, Any]:
        """The run so far, as `posttrain run --json` and the report have it."""
        stages = {name: self.entries[name] for name in self.recipe.stages if name in self.entries}
        cut = "interrupted" if self._interrupted else "failed"
        return {
            "run": self.id,
            "recipe": self.recipe.name,
            **({"sweep": self.trial.to_json()} if self.trial else {}),
            "state": "ok" if self.is_done() else cut,
            "seconds": round(time.monotonic() - self._started, 3),
            "started_at": self.started_at,
            "recipe_yaml": self.recipe.text,
            "stages": stages,
        }

    def is_done(self) -> bool:
        """Whether every stage has ended well, even where the run was told to end then."""
        missing = any(name not in self.entries for name in self.recipe.stages)
        return not (missing or self._cut_short or any(entry["state"] in BROKEN for entry in self.entries.values()))

    def stop(self) -> None:
        """End what runs, from another thread than the run's own, which then enters how its stages ended."""
        self._interrupted = True
        self.supervisors.stop()

    def finish(self) -> dict[str, Any]:
        """End what still runs, enter what was never reached, and keep the payload in the store; once."""
        if self._final is not None:
            return self._final
        self.supervisors.stop()
        why = sys.exception()
        # Ctrl-C, SIGTERM, cancelled
        self._interrupted = self._interrupted or (why is not None and not isinstance(why, Exception))
        for name, decision in self.plan.decisions.items():
            if name not in self.entries:
                self._cut_short = True
                self._end(name, skipped_entry(self._stage(name), decision, ENDED_BEFORE))
        self._final = payload = self.payload()
        try:
            self._record.end(payload)
            self.claim.drop()
        finally:  # people see how the stages ended even where the store cannot keep it
            payload |= self._moved.to_json()
            self.listener.finished(payload)
        return payload

    def _stage(self, name: str) -> RecipeStage:
        return self.recipe.stages[name]

    def _end(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        self.listener.ended(name, entry)

    def _decided(self, name: str) -> Decision:
        """The decision with the inputs as they are now; a cached result is young again, so that it stays."""
        while True:
            decision = self.plan.decide(name, self.outputs)
            if decision.state != "cached" or self._renewed(decision):
                return decision

    def _renewed(self, decision: Decision) -> bool:
        """Whether the outputs are still there."""
        return all(self.store.renew(artifact) for artifact in decision.outputs.values())

    def _take(self, name: str, decision: Decision) -> Outcome:
        outputs = decision.outputs
        self._publish(name, outputs)
        self._end(name, entry_of(self._stage(name), decision, state="cached"))
        self._record.write()
        return Outcome(True, "; ".join(decision.reasons), outputs)

    def _make(self, name: str, decision: Decision, on_event: Callable[[Event], None] | None, occupy: Occupy) -> Outcome:
        stage = self._stage(name)
        self.listener.started(name, "; ".join(decision.reasons))
        self._record.begin(name, decision)

        tell = self._telling(name, on_event)
        made = self._maker.make(stage, decision, occupy, tell)
        outputs = made.result.artifacts()
        self._publish(name, outputs)
        self._end(name, ran_entry(stage, decision, made.result, sum(made.in_vain) if made.in_vain else None))
        self._record.write()
        made.tidy()
        return Outcome(False, "; ".join(decision.reasons), outputs)

    def _publish(self, name: str, outputs: Mapping[str, Artifact]) -> None:
        """Make the outputs known to the stages after it and, by name, to people and other recipes."""
        self.claim.add(outputs.values())
        named = in_order(self._stage(name), outputs) if self.trial is None else {}  # names are for what was decided on
        for position, (output, artifact) in enumerate(named.items()):
            if position == 0:
                self._moved.watch(name, artifact)
                self.store.set_alias(f"{self.recipe.name}/{name}", artifact)
            self.store.set_alias(f"{self.recipe.name}/{name}.{output}", artifact)
        # last: what failed so far gives nothing to the stages after it
        self.outputs[name] = outputs

    def _telling(self, name: str, on_event: Callable[[Event], None] | None) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            self.listener.event(name, event)
            if on_event is not None:
                on_event(event)

        return tell

    @contextlib.contextmanager
    def _lease(self, name: str, decision: Decision, on_event: Callable[[Event], None] | None) -> Iterator[Decision]:
        """Yields the decision to act on: cached where another run did the work meanwhile."""
        assert decision.fingerprint is not None
        lease = self.store.lease(decision.fingerprint, self.id)
        stopping, tell = self.supervisors.stopping, self._telling(name, on_event)
        with holding(lease, name, stopping, lambda text: tell({"kind": "log", "text": text})):
            if self.store.lookup(self._stage(name).uses.name, decision.fingerprint) is not None:
                decision = self._decided(name)
            with renewing(lease):
                yield decision


def new_run_id(sweep: str | None = None) -> str:
    """`20261122-134559-3fa9c1`: sorts by time, and two runs started at once differ; a trial's has its sweep in it."""
    return "-".join([f"{datetime.now(UTC):%Y%m%d-%H%M%S}", *([sweep] if sweep else []), os.urandom(3).hex()])
