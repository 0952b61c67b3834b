"""The objective of supervised fine-tuning: negative log-likelihood of the asked-for tokens; its unit is a token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.losses.supervised import nll
from stages.training.batch import Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import token_losses
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
        loss, scores = forward(batch, token_losses(batch, lambda logprobs_C, _: nll(logprobs_C)))
        metrics = {
            "entropy": Mean(scores.entropy_N.sum(), len(scores.entropy_N)),
            "mean_token_accuracy": Mean(scores.is_likeliest_N.sum(), len(scores.is_likeliest_N)),
        }
        return loss, metrics
