"""The objective of supervised fine-tuning: negative log-likelihood of the asked-for tokens; its unit is a token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.training.batch import Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import token_logprobs
from stages.training.objective import Forward


def asked_tokens(group: Group) -> int:
    """Number of tokens of a group whose log-probability is asked for."""
    return sum(
        len(branch.token_ids) if branch.loss_mask is None else sum(branch.loss_mask) for branch in group.branches
    )


class TokenLoss:
    """Sum of -log p over asked-for tokens."""

    metric_names: Sequence[str] = ("entropy", "mean_token_accuracy")

    def count(self, group: Group) -> float:
        """Asked-for tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of -log p, TRL's SFT metrics)."""
        logprobs_N, entropy_N, is_likeliest_N = forward(batch, token_logprobs(batch))
        count = len(logprobs_N)
        metrics = {
            "entropy": Mean(entropy_N.sum(), count),
            "mean_token_accuracy": Mean(is_likeliest_N.sum(), count),
        }
        return -logprobs_N.sum(), metrics
