"""Scores of a reward-model artifact for completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from artifacts.errors import StageError
from stages.context import Context
from stages.data.retokenize import Retokenizer
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.classifiers import load_reward_model
from stages.training.model import Scorer, branch_rewards, load_tokenizer
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients
from stages.training.start import freeze


class RewardModelScorer:
    """The reward of every completion of a prompt; what a prompt's completions begin with is computed once.

    A reward model with the vocabulary of `tokenizer`, the policy's, is given the tokens as they were sampled; another
    one, or one that meets completions whose tokenizer is not known (None), the text.
    """

    def __init__(
        self, context: Context, tokenizer: Any, device: torch.device, budget_tokens: int, *, bf16: bool = False
    ) -> None:
        folder = context.input("reward_model")
        own = load_tokenizer(folder)
        same = tokenizer is not None and tokenizer.get_vocab() == own.get_vocab()
        self.retokenize = None if same else Retokenizer(own)
        if not same and tokenizer is not None:
            context.log("the reward model has a tokenizer of its own: completions are tokenized anew for it")
        self.scorer = freeze(context, Scorer(load_reward_model(folder)), bf16).to(device)
        self.budget = TokenBudget(context, budget_tokens)

    def __call__(
        self,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """[prompts][completions] rewards. Raises StageError for a text that is too long for the reward model."""
        groups = [
            self._group(prompt, group, group_texts)
            for prompt, group, group_texts in zip(prompts, completions, texts, strict=True)
        ]
        return score_branches(self.scorer, groups, self.budget)

    def _group(self, prompt: TokenizedPrompt, completions: Sequence[Completion], texts: Sequence[str]) -> Group:
        prefix, branches = prompt.prompt_ids, [completion.token_ids for completion in completions]
        if self.retokenize is not None:
            finished = [completion.finished for completion in completions]
            prefix, branches = self.retokenize(prompt.row, texts, finished)
        for number, ids in enumerate(branches):
            if len(prefix) + len(ids) > self.scorer.context_length:
                raise StageError(
                    f"row {prompt.row_id}, completion {number}: {len(prefix) + len(ids)} tokens for the reward model, "
                    f"which takes {self.scorer.context_length}; lower max_length or max_completion_length"
                )
        return Group(prompt.row_id, prefix, tuple(Branch(ids) for ids in branches))


def score_branches(scorer: Scorer, groups: Sequence[Group], budget: TokenBudget) -> list[list[float]]:
    """[groups][branches] rewards under a reward model, where transformers reads them: at the last token that is not
    what the model's config calls padding. Some are trained with the end token as that."""
    pad = scorer.transformers_model.config.get_text_config().pad_token_id
    groups = [_without_padding(group, pad) for group in groups]
    results: list[list[float]] = [[] for _ in groups]

    def compute(indices: list[int], batch: TokenBatch) -> None:
        rewards = scorer(batch, branch_rewards(batch)).tolist()
        for index in indices:
            results[index] = [rewards.pop(0) for _ in groups[index].branches]

    without_gradients(scorer, groups, budget, compute)
    return results


def _without_padding(group: Group, pad: int | None) -> Group:
    """Its sequences up to their last token that is none; no later token has a say in the score there."""
    if not any((branch.token_ids or group.prefix_ids)[-1] == pad for branch in group.branches):
        return group
    rows = [[*group.prefix_ids, *branch.token_ids] for branch in group.branches]
    ends = [max((place for place, token in enumerate(row, 1) if token != pad), default=1) for row in rows]
    shared = min(len(group.prefix_ids), min(ends) - 1)
    branches = (Branch(row[shared:end]) for row, end in zip(rows, ends, strict=True))
    return replace(group, prefix_ids=group.prefix_ids[:shared], branches=tuple(branches))
