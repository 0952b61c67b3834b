"""Scores of a reward-model artifact for completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stages.context import Context
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.classifiers import load_reward_model
from stages.training.distill_windows import require_same_vocabulary
from stages.training.model import Scorer, branch_rewards, load_tokenizer
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients
from stages.training.start import settle_packing


class RewardModelScorer:
    """The reward of every completion of a prompt; a prompt is computed once for all of its completions."""

    def __init__(self, context: Context, tokenizer: Any, device: torch.device, budget_tokens: int) -> None:
        folder = context.input("reward_model")
        require_same_vocabulary(tokenizer, load_tokenizer(folder))
        self.scorer = Scorer(load_reward_model(folder)).eval().requires_grad_(False)
        settle_packing(context, self.scorer)
        self.scorer.to(device)
        self.budget = TokenBudget(context, budget_tokens)

    def __call__(
        self, prompts_ids: Sequence[Sequence[int]], completions_ids: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """[prompts][completions] rewards, from token ids."""
        groups = [
            Group(str(index), prompt, tuple(Branch(ids) for ids in completions))
            for index, (prompt, completions) in enumerate(zip(prompts_ids, completions_ids, strict=True))
        ]
        return score_branches(self.scorer, groups, self.budget)


def score_branches(scorer: Scorer, groups: Sequence[Group], budget: TokenBudget) -> list[list[float]]:
    """[groups][branches] rewards under a reward model."""
    results: list[list[float]] = [[] for _ in groups]

    def compute(indices: list[int], batch: TokenBatch) -> None:
        rewards = scorer(batch, branch_rewards(batch)).tolist()
        for index in indices:
            results[index] = [rewards.pop(0) for _ in groups[index].branches]

    without_gradients(scorer, groups, budget, compute)
    return results
