"""What the process of a stage is told, as `spec.json` holds it."""

from __future__ import annotations

from typing import Any

from flows.command import default_threads
from flows.decision import Decision
from flows.inputs import input_specs
from flows.plan import Plan
from flows.recipe import RecipeStage
from flows.written import source_of
from stages.held import planned_outside


def spec_of(plan: Plan, stage: RecipeStage, decision: Decision, run_id: str, *, beside: int) -> dict[str, Any]:
    """The values of `stages.spec.Spec`, for a stage whose inputs are all there; as many as `beside` run at once."""
    assert decision.identity is not None
    many = {name: declared.many for name, declared in stage.uses.inputs.items()}
    inputs = input_specs(decision.inputs, many)
    outside = planned_outside(stage.config, decision.identity, inputs)
    return {
        "stage": stage.uses.name,
        "name": stage.name,
        "config": stage.config.model_dump(mode="json"),
        "inputs": inputs,
        "fingerprint": decision.fingerprint,
        "identity": decision.identity,
        "store": plan.store.url,
        "run": run_id,
        "recipe": plan.recipe.name,
        "job": str(plan.store.scratch.absolute() / run_id / stage.name),
        "processes": stage.launch.processes,
        "threads": stage.launch.threads or default_threads(stage.launch.processes, beside),
        "launcher": stage.launch.config,
        "source": source_of(plan.recipe, stage.name),
        "outside": plan.outside.known((named.kind, named.where) for named in outside),
    }
