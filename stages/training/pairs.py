"""Objectives over pairs of completions of one prompt: preference losses and the reward model's. The unit is a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.data.pairs import TokenizedPair
from stages.losses.preference import PairLogprobs
from stages.losses.reward import bradley_terry
from stages.training.batch import Branch, Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import branch_rewards, token_logprobs
from stages.training.objective import Forward


@dataclass(frozen=True)
class Reference:
    """Summed log-probabilities of a pair under the reference model."""

    chosen: float
    rejected: float


def pair_group(pair: TokenizedPair, data: object = None) -> Group:
    """Chosen is the first branch, rejected the second."""
    return Group(pair.row_id, pair.prompt_ids, (Branch(pair.chosen_ids), Branch(pair.rejected_ids)), data)


class PreferenceLoss:
    """A preference loss over log-probability sums, against fixed reference sums."""

    metric_names: Sequence[str] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "entropy",
    )

    def __init__(self, loss: Callable[[PairLogprobs], Tensor], beta: float) -> None:
        self.loss, self.beta = loss, beta

    def count(self, group: Group) -> float:
        """One pair."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the pairs' losses, TRL's DPO metrics)."""
        logprobs_N, entropy_N, _ = forward(batch, token_logprobs(batch, with_entropy=True))
        pairs = pair_logprobs(batch, logprobs_N)
        losses_B = self.loss(pairs)
        chosen_B, rejected_B = pairs.rewards(self.beta)
        count = len(losses_B)
        metrics = {
            "rewards/chosen": Mean(chosen_B.sum(), count),
            "rewards/rejected": Mean(rejected_B.sum(), count),
            "rewards/accuracies": Mean((chosen_B > rejected_B).sum(), count),
            "rewards/margins": Mean((chosen_B - rejected_B).sum(), count),
            "logps/chosen": Mean(pairs.chosen_B.sum(), count),
            "logps/rejected": Mean(pairs.rejected_B.sum(), count),
            "entropy": Mean(entropy_N.sum(), len(entropy_N)),
        }
        return losses_B.sum(), metrics


def pair_logprobs(batch: TokenBatch, logprobs_N: Tensor) -> PairLogprobs:
    """Sums over chosen and rejected branches, beside the references that the groups carry."""
    sums_K, tokens_K = batch.sum_by_branch(logprobs_N), batch.tokens_per_branch()
    references = [group.data for group in batch.groups]
    return PairLogprobs(
        chosen_B=sums_K[0::2],
        rejected_B=sums_K[1::2],
        reference_chosen_B=sums_K.new_tensor([reference.chosen for reference in references]),
        reference_rejected_B=sums_K.new_tensor([reference.rejected for reference in references]),
        chosen_tokens_B=tokens_K[0::2],
        rejected_tokens_B=tokens_K[1::2],
    )


class RewardLoss:
    """Bradley-Terry on the rewards of the last tokens; the groups carry the margin, or None."""

    metric_names: Sequence[str] = ("accuracy", "margin", "mean_reward")

    def __init__(self, center_rewards_coefficient: float) -> None:
        self.center = center_rewards_coefficient

    def count(self, group: Group) -> float:
        """One pair."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the pairs' losses, TRL's reward metrics)."""
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
