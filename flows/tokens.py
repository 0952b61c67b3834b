"""`posttrain tokens`: the rows of a stage's input as its model will read them, before it runs."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from artifacts.errors import RequestError
from flows.inputs import ResolvedInput, StageOutput
from flows.plan import Plan
from flows.recipe import RecipeStage
from stages.context import Context
from stages.names import nearest
from stages.spec import Spec

if TYPE_CHECKING:
    from stages.training.token_view import Reading


def read_tokens(plan: Plan, name: str, *, input: str = "dataset", row: str | None = None, limit: int = 3) -> Reading:
    """Raises RequestError for a stage that learns from no rows, one whose model or rows are not there yet, and a row
    that does not exist."""
    from stages.training.token_view import Wanted, seen_rows

    stage = _stage(plan, name)
    inputs = {"model": _found(plan, stage, "model").spec(), "dataset": _found(plan, stage, input).spec()}
    config = stage.config.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as job:
        # nothing of the configuration is read from outside
        spec = Spec(stage.uses.name, stage.name, config, inputs, "", {"config": {}}, plan.store.url, job)
        return seen_rows(Context(spec, plan.store), Wanted(input, row, limit))


def _stage(plan: Plan, name: str) -> RecipeStage:
    stages = plan.recipe.stages
    if name not in stages:
        raise RequestError(f"recipe {plan.recipe.name} has no stage {name!r}{nearest(name, stages)}")
    if stages[name].uses.tokenized is None:
        able = [other for other, stage in stages.items() if stage.uses.tokenized is not None]
        raise RequestError(
            f"stage {name} ({stages[name].uses.name}) has no rows that its model reads as they are; those that have: "
            f"{', '.join(able) or 'none of this recipe'}"
        )
    return stages[name]


def _found(plan: Plan, stage: RecipeStage, name: str) -> ResolvedInput:
    if name not in stage.inputs:
        raise RequestError(f"stage {stage.name} has no input {name} wired in; it has: {', '.join(stage.inputs)}")
    reference = stage.inputs[name][0]
    if not isinstance(reference, StageOutput):
        return plan.externals[reference]
    made = plan.decisions[reference.stage].outputs.get(reference.output)
    if made is None:
        raise RequestError(
            f"input {name} of stage {stage.name} comes from stage {reference.stage}, whose result is not there yet; "
            f"run the recipe with --until {reference.stage} first"
        )
    return ResolvedInput.of(made)
