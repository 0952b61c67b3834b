"""Whether the sampler has the trainer's weights and computes as it does, for objectives that would not notice."""

from __future__ import annotations

from stages.training.batch import Group
from stages.training.loop import Trainer
from stages.training.out_of_memory import TokenBudget
from stages.training.reference import branch_logprobs
from stages.training.token_table import TokenTable


class SamplerCheck:
    """Looks at the first groups that a process samples; leaves all as they are."""

    def __init__(self, trainer: Trainer, *, temperature: float, tolerance: float | None) -> None:
        self.trainer, self.temperature, self.tolerance = trainer, temperature, tolerance
        self.budget = TokenBudget(trainer.context, trainer.config.micro_batch_tokens)
        self._is_due = tolerance is not None

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The groups. Raises StageError where a token's log-probabilities differ by more than the tolerance."""
        if self._is_due:
            scored = branch_logprobs(self.trainer.policy(), groups, self.budget, temperature=self.temperature)
            logprobs = [[values for values, _ in branches] for branches in scored]
            TokenTable.of(groups, logprobs, logprobs, None).compare(self.tolerance)
            self._is_due = False
        return groups
