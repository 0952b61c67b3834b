"""Whether the sampler has the trainer's weights and computes as it does, for objectives that would not notice."""

from __future__ import annotations

from dataclasses import replace

from stages.training.batch import Group
from stages.training.loop import Trainer
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs
from stages.training.token_table import TokenTable


class SamplerCheck:
    """Looks at the first groups that a process samples; leaves all as they are."""

    def __init__(
        self, trainer: Trainer, *, temperature: float, tolerance: float | None, completions: int | None = None
    ) -> None:
        """`completions`: so many of a prompt's are the policy's, the first ones; None: all."""
        self.trainer, self.temperature, self.tolerance = trainer, temperature, tolerance
        self.completions = completions
        self.budget = TokenBudget(trainer.context, trainer.config.micro_batch_tokens)
        self._is_due = tolerance is not None

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The groups. Raises StageError where a token's log-probabilities differ by more than the tolerance."""
        if self._is_due:
            own = [self._own(group) for group in groups]
            scored = branch_logprobs(self.trainer.policy(), own, self.budget, temperature=self.temperature)
            logprobs = [[values for values, _ in branches] for branches in scored]
            TokenTable.of(own, logprobs, logprobs, None).compare(self.tolerance)
            self._is_due = False
        return groups

    def _own(self, group: Group) -> Group:
        first = slice(self.completions)
        data = replace(group.data, sampled_logprobs=group.data.sampled_logprobs[first])
        return replace(group, branches=group.branches[first], data=data)
