"""Settings of stages that sample completions of held-out prompts while they train. Imports no torch."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from pydantic import Field

from stages.training.config import MeasuredConfig, unused_measuring


class SampledMeasuringConfig(MeasuredConfig):
    """How the policy of the moment completes the prompts of input `eval_dataset`; all else is as in training."""

    eval_temperature: float = Field(0.0, ge=0)
    """Temperature of these completions; 0 takes the likeliest token."""
    eval_num_generations: int = Field(1, gt=0)
    """Completions of each of these prompts."""
    eval_max_prompts: int | None = Field(None, gt=0)
    """Take so many of them, the first ones; null: all."""

    def measures(self) -> list[str]:
        """And of sampling."""
        return super().measures() + self.samples_apart()

    def samples_apart(self) -> list[str]:
        """What is given of sampling held-out prompts."""
        names, fields = ("eval_temperature", "eval_num_generations", "eval_max_prompts"), type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]


def eval_sampling_problems(config: SampledMeasuringConfig) -> list[str]:
    """What does not go together in sampling held-out prompts."""
    if config.eval_temperature or config.eval_num_generations == 1:
        return []
    return [
        f"eval_num_generations is {config.eval_num_generations}, but at eval_temperature 0 they would all be the same; "
        "give an eval_temperature, or leave it out"
    ]


def held_out_problems(config: Any, wired: Set[str]) -> list[str]:
    """`Stage.check` of stages whose held-out completions are rewarded."""
    problems = unused_measuring(config, frozenset(wired)) + eval_sampling_problems(config)
    if "eval_dataset" not in wired:
        return problems
    if "rollouts" in wired:
        problems.append(
            "with input rollouts the stage samples and scores nothing, so it cannot measure input eval_dataset: leave "
            "it out, and let a stage evaluate measure the model"
        )
    if getattr(getattr(config, "rollouts", None), "in_flight_updates", False):
        problems.append(
            "with rollouts.in_flight_updates input eval_dataset would change what is trained: to measure it, what is "
            "in flight must end first, with older weights; leave one of the two out"
        )
    return problems
