"""What a run would do: for every stage whether it is cached, resumes, runs or may run, and why.

The store is asked; nothing is run and nothing is written. The same decision is made again, with the inputs as
they then are, when a stage's turn comes: one that ran again and wrote equal bytes leaves the others cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from artifacts import Artifact, Store
from flows.decision import Decision, Outputs
from flows.inputs import External, ResolvedInput
from flows.plan_checks import plan_problems
from flows.planner import Planner
from flows.recipe import Reading, Recipe
from flows.selection import Selection, select
from stages.outside import Outside


@dataclass(frozen=True)
class Plan:
    """The decisions for all stages of a recipe, and the means to decide again with the inputs at hand."""

    recipe: Recipe
    store: Store
    selection: Selection
    decisions: Mapping[str, Decision]
    externals: Mapping[External, ResolvedInput]
    """What every reference to something outside the recipe meant when the plan was made."""
    outside: Outside
    """Files and code as they were then: that is what all stages of a run are to read."""

    def decide(self, name: str, outputs: Outputs) -> Decision:
        """Cached, resume or run, for a stage of which every input is there."""
        planner = Planner(self.recipe, self.store, self.selection, self.outside, dict(self.externals))
        return planner.decide(name, outputs)

    def artifacts(self) -> list[Artifact]:
        """All that the plan found in the store and builds on."""
        outside = [found.artifact for found in self.externals.values() if found.artifact is not None]
        return outside + [found for decision in self.decisions.values() for found in decision.outputs.values()]

    def to_json(self) -> dict[str, Any]:
        """For `posttrain plan --json`."""
        stages = {
            name: {"uses": self.recipe.stages[name].uses.name, **decision.to_json()}
            for name, decision in self.decisions.items()
        }
        return {"recipe": self.recipe.name, "store": self.store.url, "stages": stages}


def plan(
    recipe: Recipe,
    store: Store,
    *,
    only: Iterable[str] = (),
    start: Iterable[str] = (),
    until: Iterable[str] = (),
    force: Iterable[str] = (),
) -> Plan:
    """Decide for every stage.

    Raises RequestError for references that lead nowhere, for selected stages whose inputs are neither in the store nor
    selected, and for what `plan_problems` finds; StoreError when the store does not answer.
    """
    return plan_reading(Reading(recipe), store, only=only, start=start, until=until, force=force)


def plan_reading(
    read: Reading,
    store: Store,
    *,
    only: Iterable[str] = (),
    start: Iterable[str] = (),
    until: Iterable[str] = (),
    force: Iterable[str] = (),
    here: bool = True,
) -> Plan:
    """`plan` of a recipe that may be wrong: its mistakes are raised with all others that can be known by now. `here`:
    it is to run in this environment, so what that lacks is one of them."""
    recipe = read.recipe
    selection, wrong = select(recipe.needs, only, start, until, force)
    planner = Planner(recipe, store, selection, Outside(), {})
    planner.broken |= read.wrong_stages()
    planner.resolve_externals()
    decisions = planner.walk()
    made = Plan(recipe, store, selection, decisions, planner.externals, planner.outside)
    # of a selection that is wrong nobody knows what it was to read
    problems = [*planner.problems, *(wrong or planner.absent)] if recipe.needs else []
    problems += plan_problems(made, planner.broken, planner.open, here=here)
    if refusal := read.refusal(*problems):
        raise refusal
    return made
