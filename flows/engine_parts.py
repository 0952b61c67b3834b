"""Engines of vLLM that training processes share: refused where the model cannot be split over them."""

from __future__ import annotations

from artifacts.errors import Problem
from flows.memory import Shapes
from flows.plan import Plan
from stages.rollouts.engine_settings import EngineChoice
from stages.rollouts.engine_split import model_problems
from stages.training.memory_shape import ModelShape


def parts_problems(plan: Plan) -> list[Problem]:
    """Of the plan's stages, as far as the sizes of their models are known."""
    shapes, problems = Shapes(plan), []
    for name, stage in plan.recipe.stages.items():
        models = shapes.of_inputs(name)
        shapes.add_outputs(name, models)
        model, config = models.get("model"), stage.config
        if plan.decisions[name].state == "skipped" or not isinstance(config, EngineChoice):
            continue
        if isinstance(model, ModelShape) and (together := config.rollouts.processes_per_engine) > 1:
            where = plan.recipe.where("stages", name, "with", "rollouts", "tensor_parallel_size")
            sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "intermediate": model.intermediate}
            found = model_problems(together, **sizes, vocabulary=model.vocabulary)
            problems += [Problem(where, what) for what in found]
    return problems
