"""What the groups of rollouts carry of the step that they are part of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.training.batch import Group
from stages.training.entropy_bonus import BranchValues, StepEntropy, branch_entropies
from stages.training.out_of_memory import TokenBudget

if TYPE_CHECKING:
    from stages.training.loop import Trainer
    from stages.training.policy import PolicyLoss

OfStep = Callable[[list[Group], bool], list[Group]]
"""(groups of a step, whether they are on policy) -> the groups as the loss takes them."""


def step_of(trainer: Trainer, objective: PolicyLoss, config: Any) -> OfStep:
    """As a stage's configuration (a `PolicyLossConfig`) says."""
    budget = TokenBudget(trainer.context, config.micro_batch_tokens)

    def measure(groups: list[Group]) -> list[BranchValues]:
        return branch_entropies(trainer.policy(), groups, budget, temperature=config.temperature)

    settled = StepEntropy(objective.count, config.top_entropy_quantile, measure)
    needed = config.has_entropy_bonus or config.top_entropy_quantile < 1

    def of_step(groups: list[Group], on_policy: bool) -> list[Group]:
        if on_policy:
            groups = [replace(group, data=replace(group.data, old_logprobs=None)) for group in groups]
        return settled(groups) if needed else groups

    return of_step
