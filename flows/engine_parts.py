"""Engines of vLLM that training processes share: refused where the model cannot be split over them."""

from __future__ import annotations

from artifacts.errors import Problem
from flows.plan import Plan
from stages.rollouts.engine_settings import EngineChoice
from stages.rollouts.engine_split import model_problems
from stages.training.memory_shape import ModelShape


def parts_problems(plan: Plan, name: str, model: ModelShape) -> list[Problem]:
    """Of a stage whose input `model` is this."""
    config = plan.recipe.stages[name].config
    if not isinstance(config, EngineChoice) or (together := config.rollouts.processes_per_engine) == 1:
        return []
    place = ("stages", name, "with", "rollouts", "tensor_parallel_size")
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "intermediate": model.intermediate}
    return [plan.recipe.problem(place, what) for what in model_problems(together, **sizes, vocabulary=model.vocabulary)]
