"""Entropy in the loss of a policy: a bonus, fixed or following a target, and the choice of high-entropy tokens.

Both are about all tokens of an optimizer step, over all micro-batches and processes; so they are settled before a step
is cut up, and its groups carry what follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.model import Scorer, token_logprobs
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients

BranchValues = tuple[list[float], ...]
"""Of a group: a value for every asked-for token of every branch."""


class Target(NamedTuple):
    """What an adaptive coefficient follows, step by step (Skywork-OR1, arXiv:2505.22312)."""

    entropy: float
    delta: float
    """What the coefficient changes by in a step."""
    lowest: float
    highest: float


@dataclass
class EntropyBonus:
    """The loss less coefficient x mean entropy of the tokens that are learned from.

    With a target the coefficient rises after a step whose entropy was at most the target and falls after others, and
    the bonus is given only where the step before was at most at the target; none in the first step.
    """

    coefficient: float
    target: Target | None = None
    last_entropy: float = math.inf

    def applied(self) -> float:
        """The coefficient of the present step."""
        return 0.0 if self.target is not None and self.last_entropy > self.target.entropy else self.coefficient

    def follow(self, entropy: float) -> None:
        """Take in the mean entropy of a step."""
        if self.target is None:
            return
        if entropy <= self.target.entropy:
            self.coefficient = min(self.coefficient + self.target.delta, self.target.highest)
        else:
            self.coefficient = max(self.coefficient - self.target.delta, self.target.lowest)
        self.last_entropy = entropy

    def state(self) -> dict[str, Any]:
        """JSON values."""
        seen = None if math.isinf(self.last_entropy) else self.last_entropy
        return {"coefficient": self.coefficient, "last_entropy": seen}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.coefficient = state["coefficient"]
        self.last_entropy = math.inf if state["last_entropy"] is None else state["last_entropy"]


@dataclass(frozen=True)
class StepEntropy:
    """Gives the groups of a step the share of an item that a token's entropy has, and marks high-entropy tokens."""

    count: Callable[[Group], float]
    """Items of a group, by which the loop divides."""
    quantile: float
    """Share of the step's tokens that is learned from, those of the highest entropy."""
    measure: Callable[[list[Group]], list[BranchValues]]
    """Entropies under the policy as it is."""

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The same groups with `kept` and `entropy_share`."""
        kept = self._kept(groups) if self.quantile < 1 else [None] * len(groups)
        tokens = sum(
            asked_tokens(group) if one is None else sum(map(sum, one)) for group, one in zip(groups, kept, strict=True)
        )
        share = sum(self.count(group) for group in groups) / max(1, tokens)
        return [
            replace(group, data=replace(group.data, kept=one, entropy_share=share))
            for group, one in zip(groups, kept, strict=True)
        ]

    def _kept(self, groups: list[Group]) -> list[tuple[list[bool], ...] | None]:
        """Which tokens are at or above the quantile of all (arXiv:2506.01939)."""
        entropies = self.measure(groups)
        of_all = [value for branches in entropies for values in branches for value in values]
        threshold = float(np.quantile(of_all, 1 - self.quantile)) if of_all else 0.0
        return [tuple([value >= threshold for value in values] for values in branches) for branches in entropies]


def branch_entropies(
    scorer: Scorer, groups: Sequence[Group], budget: TokenBudget, *, temperature: float
) -> list[BranchValues]:
    """For every group, for every branch: entropies of its asked-for tokens' distributions, in nats."""
    results: list[BranchValues] = [()] * len(groups)

    def compute(indices: list[int], batch: TokenBatch) -> None:
        scores = scorer(batch, token_logprobs(batch, temperature=temperature, with_entropy=True))
        parts = iter(scores.entropy_N.cpu().split(batch.counts))
        for index in indices:
            results[index] = tuple(next(parts).tolist() for _ in groups[index].branches)

    scorer.eval()
    without_gradients(scorer, groups, budget, compute)
    return results
