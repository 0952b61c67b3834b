"""How the decision for a stage is made: from its inputs, what it names outside, and what the store has of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from artifacts import Store
from artifacts.errors import DamagedError, Problem, RequestError
from flows.causes import input_line
from flows.decision import Decision, Outputs
from flows.history import History
from flows.inputs import External, ResolvedInput, StageOutput, input_digests, resolve_external
from flows.named_outside import refused_outside
from flows.outside import fallen_outside, notes_on
from flows.recipe import Recipe, RecipeStage
from flows.selection import Selection
from stages.external import resolve_reference
from stages.hub_cache import noted
from stages.identity import fingerprint, identity
from stages.outside import Outside


class Planner:
    """Decides stage by stage; what is wrong with the recipe gathers in it."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        selection: Selection,
        outside: Outside,
        externals: dict[External, ResolvedInput],
    ) -> None:
        self.recipe = recipe
        self.store = store
        self.selection = selection
        self.outside = outside
        self.externals = externals
        self.history = History.of(recipe, store)
        self.problems: list[Problem] = []
        self.absent: list[Problem] = []
        """Results that the selection leaves out and that are not in the store."""
        self.broken: set[str] = set()
        """Stages with a mistake in what they are made of: nothing that only follows from it is said."""
        self.open: set[str] = set()
        """Those and the ones that may run for nothing but their sake."""
        self.begins: dict[str, str] = {}
        """Stage that will or may run -> the stage where that begins, perhaps itself."""

    def resolve_externals(self) -> None:
        """Look up aliases, folders and Hub names of the stages that count."""
        relevant = self._relevant()
        for wanted in self.recipe.wanted:
            if wanted.stage not in relevant:
                continue
            try:
                self.externals[wanted.reference] = resolve_external(
                    wanted.reference, wanted.kinds, self.store, self.outside
                )
            except (RequestError, DamagedError) as error:
                self.problems.append(self.recipe.problem(wanted.place, str(error)))
                self.broken.add(wanted.stage)

    def walk(self) -> dict[str, Decision]:
        """A decision for every stage, those it reads from first; what is wrong with one is added to `problems`."""
        decisions: dict[str, Decision] = {}
        relevant = self._relevant()
        for name, stage in self.recipe.stages.items():
            if name not in relevant:
                decisions[name] = Decision(name, "skipped", (self.selection.reason,))
                continue
            unknown = [need for need in stage.needs if need not in decisions or decisions[need].record is None]
            self.begins[name] = name
            try:
                if name in self.broken:
                    self.problems += self._unreadable(stage)
                elif unknown:
                    decisions[name] = self._decide_unknown(stage, decisions, unknown)
                else:
                    decisions[name] = self.decide(name, {need: decisions[need].outputs for need in stage.needs})
            except RequestError as error:  # data or code that cannot be read
                self.problems += self._unreadable(stage) or [self.recipe.problem(("stages", name), str(error))]
                self.broken.add(name)
            if name in self.broken:
                decisions[name] = Decision(name, "run", ("something is wrong with it",))
            if name in self.broken or (decisions[name].state == "may_run" and self._only_open(unknown)):
                self.open.add(name)
        self.absent = self._not_there(decisions)
        return {name: self._shown(decision) for name, decision in decisions.items()}

    def _only_open(self, needs: Iterable[str]) -> bool:
        return all(need in self.open or need not in self.recipe.stages for need in needs)

    def _unreadable(self, stage: RecipeStage) -> list[Problem]:
        """Data and code that its configuration names and that cannot be read."""
        place = ("stages", stage.name, "with")
        base = self.recipe.base
        found = refused_outside(
            stage.uses.config,
            self.recipe.written(*place),
            lambda mark, text: self.outside.content(mark.kind, resolve_reference(mark.kind, text, base)),
        )
        return [self.recipe.problem((*place, *inner), what) for inner, what in found]

    def decide(self, name: str, outputs: Outputs) -> Decision:
        """For a stage of which every input is there."""
        stage = self.recipe.stages[name]
        inputs = {
            input_name: tuple(self._resolved(reference, outputs) for reference in entries)
            for input_name, entries in stage.inputs.items()
        }
        with noted() as heard:
            what = self._identity(stage, inputs)
        notes = notes_on(inputs, heard)
        key = fingerprint(what)
        record = self.store.lookup(stage.uses.name, key)
        forced = name in self.selection.forced
        fallen = None if record is None or forced else fallen_outside(stage, record, self.store)
        if record is not None and not forced and fallen is None:
            done = f"done by run {record.provenance.get('run', 'unknown')}"
            return Decision(name, "cached", (done, *notes), key, what, inputs, record)
        if fallen is not None:
            return Decision(name, "run", (fallen, *notes), key, what, inputs, fallen=fallen)
        if forced:  # anew: what an earlier run left of it is cleared when it starts
            return Decision(name, "run", ("forced", *notes), key, what, inputs)
        reasons = (*self.history.why(name, what, key), *notes)
        step = self.store.checkpoints(key).latest_step()
        shards = len(self.store.shards(key).names())
        if step is not None:
            return Decision(name, "resume", (*reasons, "a checkpoint is there"), key, what, inputs, step=step)
        if shards:
            return Decision(name, "resume", (*reasons, f"{shards} shards are done"), key, what, inputs)
        return Decision(name, "run", reasons, key, what, inputs)

    def _decide_unknown(self, stage: RecipeStage, decisions: Mapping[str, Decision], unknown: list[str]) -> Decision:
        """For a stage that reads from one that will or may run: it may run, or will for its own reasons."""
        known = {
            input_name: tuple(
                self._resolved(reference, {need: found.outputs for need, found in decisions.items()})
                for reference in entries
            )
            for input_name, entries in stage.inputs.items()
            if not any(isinstance(entry, StageOutput) and entry.stage in unknown for entry in entries)
        }
        with noted() as heard:
            what = self._identity(stage, known)
        notes = notes_on(known, heard)
        own = ("forced",) if stage.name in self.selection.forced else self.history.own_changes(stage.name, what)
        changing = [self._may_change(need) for need in unknown]
        self.begins[stage.name] = stage.name if own else self.begins.get(unknown[0], unknown[0])
        first = own and own == (History.FIRST,)
        reasons = (*own, *notes) if first else (*own, *changing, *notes)
        return Decision(stage.name, "run" if own else "may_run", reasons, inputs=known)

    def _identity(self, stage: RecipeStage, inputs: Mapping[str, tuple[ResolvedInput, ...]]) -> dict[str, Any]:
        many = {name: declared.many for name, declared in stage.uses.inputs.items()}
        return identity(stage.uses, stage.config, input_digests(inputs, many), self.outside.content)

    def _may_change(self, need: str) -> str:
        begin = self.begins.get(need, need)
        return input_line([need], "may change", f"{begin} will run" if begin != need else "")

    def _resolved(self, reference: Any, outputs: Outputs) -> ResolvedInput:
        if isinstance(reference, StageOutput):
            return ResolvedInput.of(outputs[reference.stage][reference.output])
        return self.externals[reference]

    def _relevant(self) -> frozenset[str]:
        return self.selection.selected | self.selection.needed

    def _not_there(self, decisions: Mapping[str, Decision]) -> list[Problem]:
        """Results that selected stages read and that are neither in the store nor made by this run."""
        return [
            Problem(
                self.selection.options,
                f"{name} reads from {need}, which is not selected and whose result is not in the store "
                f"({'; '.join(decisions[need].reasons)}); run with --until {need} first, or without "
                f"{self.selection.options.split()[0]}",
            )
            for name in self.recipe.stages
            if name in self.selection.selected
            for need in self.recipe.stages[name].needs
            if need in self.selection.needed and not self._only_open([need]) and decisions[need].record is None
        ]

    def _shown(self, decision: Decision) -> Decision:
        """A stage that is not selected is skipped, whatever it would do; its result stays usable."""
        if decision.stage not in self.selection.needed:
            return decision
        reasons = (f"{self.selection.reason}; its result is taken", *decision.reasons)
        return Decision(
            decision.stage,
            "skipped",
            reasons,
            decision.fingerprint,
            decision.identity,
            decision.inputs,
            decision.record,
        )
