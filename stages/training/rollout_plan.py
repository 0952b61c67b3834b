"""How prompts become optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from stages.training.rollout_selection import Selection


@dataclass(frozen=True)
class Plan:
    """How prompts become steps."""

    prompts_per_step: int
    num_generations: int
    steps_per_generation: int
    num_iterations: int
    mask_truncated: bool
    seed: int
    epochs: float
    max_steps: int | None
    selection: Selection = field(default_factory=Selection)

    @property
    def prompts_per_generation(self) -> int:
        """Prompts that are sampled at once."""
        return self.prompts_per_step * self.steps_per_generation

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps between two generations."""
        return self.steps_per_generation * self.num_iterations

    def total_steps(self, num_prompts: int) -> int:
        """Optimizer steps of the run: whole generations, so every step is full."""
        generations = math.ceil(num_prompts * self.epochs / self.prompts_per_generation)
        return self.max_steps if self.max_steps is not None else generations * self.steps_per_batch


def grouped_plan(config: Any, *, trained: int, selection: Selection | None = None) -> Plan:
    """Of a `GroupedRolloutConfig`, with a completion an item; so many of a group are `trained`."""
    return Plan(
        prompts_per_step=config.train_batch_size // trained,
        num_generations=config.num_generations,
        steps_per_generation=config.steps_per_generation,
        num_iterations=config.num_iterations,
        mask_truncated=config.mask_truncated_completions,
        seed=config.seed,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        selection=selection or Selection(),
    )


def one_step_plan(config: Any, *, num_generations: int, selection: Selection | None = None) -> Plan:
    """Of a stage's configuration with a prompt an item: every generation is trained on in one step, once."""
    return Plan(
        prompts_per_step=config.train_batch_size,
        num_generations=num_generations,
        steps_per_generation=1,
        num_iterations=1,
        mask_truncated=False,
        seed=config.seed,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        selection=selection or Selection(),
    )
