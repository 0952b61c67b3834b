"""Pairs of completions of one prompt, as groups; and the reward model's objective over them. The unit is a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.data.pairs import TokenizedPair
from stages.losses.reward import bradley_terry
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import branch_rewards
from stages.training.objective import Forward


@dataclass(frozen=True)
class Reference:
    """Summed log-probabilities of a pair under the reference model."""

    chosen: float
    rejected: float


NO_REFERENCE = Reference(0.0, 0.0)
"""For losses without a reference."""


def pair_group(pair: TokenizedPair, data: object = None, *, with_gold: bool = False) -> Group:
    """Chosen is the first branch, rejected the second, and the gold completion of triple preferences the third."""
    completions = [pair.chosen_ids, pair.rejected_ids]
    if with_gold:
        assert pair.gold_ids is not None
        completions.append(pair.gold_ids)
    return Group(pair.row_id, pair.prompt_ids, tuple(Branch(ids) for ids in completions), data)


def sum_of_tokens(logprobs: Sequence[float], shared: int, ld_alpha: float | None) -> float:
    """The sum of a completion as the loss takes it, from the log-probabilities of its tokens."""
    if ld_alpha is None:
        return sum(logprobs)
    return sum(logprobs[:shared]) + ld_alpha * sum(logprobs[shared:])


class RewardLoss:
    """Bradley-Terry on the rewards of the last tokens; the groups carry the margin, or None."""

    metric_names: Sequence[str] = ("accuracy", "margin", "mean_reward")

    def __init__(self, center_rewards_coefficient: float) -> None:
        self.center = center_rewards_coefficient

    def count(self, group: Group) -> float:
        """One pair."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the pairs' losses, TRL's reward metrics without the extremes, which depend on the step's size)."""
        rewards_K: Tensor = forward(batch, branch_rewards(batch))
        chosen_B, rejected_B = rewards_K[0::2], rewards_K[1::2]
        margins = [group.data for group in batch.groups]
        given = margins[0] is not None
        if any((margin is not None) != given for margin in margins):
            raise StageError("some rows have a margin and some have none; give all or none")
        losses_B = bradley_terry(chosen_B, rejected_B, chosen_B.new_tensor(margins) if given else None, self.center)
        count = len(losses_B)
        with torch.no_grad():
            metrics = {
                "accuracy": Mean((chosen_B > rejected_B).sum(), count),
                "margin": Mean((chosen_B - rejected_B).sum(), count),
                "mean_reward": Mean(rewards_K.sum(), 2 * count),
            }
        return losses_B.sum(), metrics
