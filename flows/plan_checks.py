"""What is wrong with a plan that the recipe alone does not show: found before anything runs, of all stages at once.

Datasets of a type that a stage does not take, packages that are not installed, models that cannot be split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from artifacts import Artifact, Store
from artifacts.contents import PAYLOAD
from artifacts.errors import Problem, StoreError
from flows.inputs import Reference, StageOutput
from flows.recipe import RecipeStage
from stages.stage import missing_packages

if TYPE_CHECKING:
    from flows.plan import Plan
    from stages.training.memory_shape import ModelShape

_RUNS = ("run", "resume", "may_run")
_DESCRIPTION = "dataset.json"
_OF_ROWS = frozenset({"reference_logprobs", "eval_reference_logprobs", "teacher_states", "eval_teacher_states"})
"""Inputs that are made of the very rows that a stage reads besides."""
_LIMITS = ("max_length", "truncation_mode")
_COMPLETION = "max_completion_length"
_ROLLOUTS = "rollouts"


def plan_problems(plan: Plan, broken: Collection[str], open_: Collection[str], *, here: bool) -> list[Problem]:
    """Of the stages that will run, or may. Nothing is said that follows from the mistakes of `broken` ones, nor of
    packages that others need only if one of these does not come out as it did (`open_`). `here`: they are to run in
    this environment."""
    types = DatasetTypes(plan)
    problems = []
    for name, stage in plan.recipe.stages.items():
        found = types.of_inputs(stage)
        types.add_outputs(stage, found)
        if plan.decisions[name].state in _RUNS:
            problems += [*_type_problems(plan, stage, found), *_made_otherwise(plan, stage)]
            problems += _not_recorded(plan, stage)
            if name not in broken:  # its code may be what is wrong
                problems += stage.asked(_columns_of_rewards, plan, stage)
            if here:
                problems += stage.asked(_lacking_environment, plan, stage)
            if name in broken or name not in open_:
                problems += stage.asked(_package_problems, plan, stage)
    return [*problems, *_model_problems(plan, broken)]


def lacking_here(plan: Plan) -> list[Problem]:
    """What stages that will run, or may, would lack in this environment."""
    stages = [stage for name, stage in plan.recipe.stages.items() if plan.decisions[name].state in _RUNS]
    return [problem for stage in stages for problem in stage.asked(_lacking_environment, plan, stage)]


@dataclass
class DatasetTypes:
    """The types of the datasets that a plan's stages read or write, as far as they are known."""

    plan: Plan
    made: dict[tuple[str, str], str] = field(default_factory=dict)
    """(stage, output) -> type."""

    def of_inputs(self, stage: RecipeStage) -> dict[str, list[str | None]]:
        """Input -> the types behind it; None: it is not known before the run."""
        return {
            name: [self._of(reference) for reference in references]
            for name, references in stage.inputs.items()
            if "dataset" in stage.uses.inputs[name].kinds
        }

    def add_outputs(self, stage: RecipeStage, inputs: Mapping[str, list[str | None]]) -> None:
        """What it has written, or will write."""
        for output, artifact in self.plan.decisions[stage.name].outputs.items():
            if artifact.kind == "dataset" and (found := _in_store(artifact, self.plan.store)):
                self.made[stage.name, output] = found["type"]
        single = {name: types[0] for name, types in inputs.items() if len(set(types)) == 1 and types[0] is not None}
        for output, known in stage.asked(_dataset_types, stage, single):
            self.made.setdefault((stage.name, output), known)

    def _of(self, reference: Reference) -> str | None:
        if isinstance(reference, StageOutput):
            return self.made.get((reference.stage, reference.output))
        return _described(self.plan, reference).get("type")


def _dataset_types(stage: RecipeStage, inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    return [] if stage.uses.dataset_types is None else [*stage.uses.dataset_types(stage.config, inputs).items()]


def _described(plan: Plan, reference: Reference) -> Mapping[str, Any]:
    """What `dataset.json` says of rows that are there; empty where they are not, or nothing can be read."""
    artifact: Artifact | None
    if isinstance(reference, StageOutput):
        decision = plan.decisions.get(reference.stage)
        artifact = None if decision is None else decision.outputs.get(reference.output)
    elif (resolved := plan.externals.get(reference)) is not None and resolved.path is not None:
        return _parsed((resolved.path / _DESCRIPTION).read_bytes())
    else:
        artifact = None if resolved is None else resolved.artifact
    return {} if artifact is None else _in_store(artifact, plan.store)


def _in_store(artifact: Artifact, store: Store) -> Mapping[str, Any]:
    try:
        return _parsed(store.files.read(f"{artifact.key}/{PAYLOAD}/{_DESCRIPTION}"))
    except (StoreError, FileNotFoundError):  # whoever reads its rows says what is wrong with it
        return {}


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("type"), str) else {}


def _type_problems(plan: Plan, stage: RecipeStage, inputs: Mapping[str, list[str | None]]) -> Iterator[Problem]:
    for name, types in inputs.items():
        taken = stage.uses.inputs[name].types
        for reference, known in zip(stage.inputs[name], types, strict=True):
            if taken and known is not None and known not in taken:
                yield plan.recipe.problem(
                    ("stages", stage.name, "inputs", name),
                    f"{reference} is a dataset of type {known}; {stage.uses.name} takes {', '.join(taken)}: normalize "
                    "the source to one of these, or wire another dataset in",
                )


def _package_problems(plan: Plan, stage: RecipeStage) -> Iterator[Problem]:
    if stage.launch.python is not None:  # that interpreter has packages of its own; the stage itself looks there
        return
    for name, what in missing_packages(stage.config).items():
        yield plan.recipe.problem(("stages", stage.name, "with", name), what)


def _lacking_environment(plan: Plan, stage: RecipeStage) -> Iterator[Problem]:
    """Tokens and addresses, in the environment that the stage's process will have."""
    environment = {**os.environ, **stage.launch.env}
    for name, what in stage.config.lacks(environment).items():
        yield plan.recipe.problem(("stages", stage.name, "with", name), what)
    if not (rewards := getattr(stage.config, "rewards", ())):
        return
    from stages.rollouts.reward_spec import usable_specs

    for built_in in filter(None, (spec.built_in() for spec in usable_specs(rewards))):
        for what in built_in.lacks(environment).values():
            yield plan.recipe.problem(("stages", stage.name, "with", "rewards"), what)


def _made_otherwise(plan: Plan, stage: RecipeStage) -> Iterator[Problem]:
    """Of inputs that another stage of the recipe has made of this one's rows: by other limits."""
    for name in _OF_ROWS & stage.inputs.keys():
        for maker in stage.inputs[name]:
            if not isinstance(maker, StageOutput) or maker.stage not in plan.recipe.stages:
                continue
            made, used = plan.recipe.stages[maker.stage].config, stage.config
            for limit in _LIMITS:
                before, now = getattr(made, limit, None), getattr(used, limit, None)
                if hasattr(made, limit) and hasattr(used, limit) and before != now:
                    yield plan.recipe.problem(
                        ("stages", stage.name, "with", limit),
                        f"is {now}, but {maker.stage} made input {name} with {limit} {before}, which cuts rows "
                        "elsewhere: give both the same",
                    )


def _not_recorded(plan: Plan, stage: RecipeStage) -> Iterator[Problem]:
    """Of input `rollouts`: stages that complete prompts keep tokens and log-probabilities in their output of that name
    alone, and to say so when it is read would be after all the training before it."""
    for maker in stage.inputs.get(_ROLLOUTS, ()):
        if not isinstance(maker, StageOutput) or maker.output == _ROLLOUTS:
            continue
        uses = plan.recipe.stages[maker.stage].uses
        if "model" in uses.inputs or _ROLLOUTS in uses.outputs:
            yield plan.recipe.problem(
                ("stages", stage.name, "inputs", _ROLLOUTS),
                f"{maker} ({uses.name}) has no tokens with the log-probabilities that they were drawn with; wire in "
                "output `rollouts` of a stage rl or rescore",
            )


def _columns_of_rewards(plan: Plan, stage: RecipeStage) -> Iterator[Problem]:
    """Of rows that are there already. Of others the stage says it, before it loads a model."""
    rewards = getattr(stage.config, "rewards", ())
    if not rewards:
        return
    from stages.rollouts.reward_columns import INPUTS, given_by, missing_columns

    given = given_by(stage.config)
    for name in INPUTS:
        for reference in stage.inputs.get(name, ()):
            for what in missing_columns(rewards, _described(plan, reference), given=given):
                yield plan.recipe.problem(
                    ("stages", stage.name, "with", "rewards"), f"input {name} ({reference}): {what}"
                )


def _model_problems(plan: Plan, broken: Collection[str]) -> Iterator[Problem]:
    """Of models whose sizes are known by now, those that `broken` stages make not among them."""
    from flows.engine_parts import parts_problems  # these two ask what the plan found
    from flows.memory import Shapes
    from stages.training.memory_shape import ModelShape

    shapes = Shapes(plan)
    for name, stage in plan.recipe.stages.items():
        models = shapes.of_inputs(name)
        if name not in broken:
            shapes.add_outputs(name, models)
        model = models.get("model")
        if not isinstance(model, ModelShape):
            continue
        if plan.decisions[name].state != "skipped":
            yield from stage.asked(parts_problems, plan, name, model)
        if plan.decisions[name].state in _RUNS:
            yield from stage.asked(_no_room, plan, name, model)


def _no_room(plan: Plan, name: str, model: ModelShape) -> Iterator[Problem]:
    """Of completions that are asked to be as long as the model's context."""
    # a default is no request: not every stage that has one samples
    written = plan.recipe.written("stages", name, "with")
    longest = getattr(plan.recipe.stages[name].config, _COMPLETION, None) if _COMPLETION in written else None
    if longest is not None and longest >= model.context:
        yield plan.recipe.problem(
            ("stages", name, "with", _COMPLETION),
            f"is {longest}, but the model takes {model.context} tokens in all, so there is no room for a prompt; "
            "lower it",
        )
