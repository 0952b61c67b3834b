"""The objective of preference optimization: a loss over log-probability sums of pairs. The unit is a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.losses.host_numbers import beside
from stages.losses.logprobs import TokenScores
from stages.losses.pair_logprobs import PairLogprobs, reverse_kl
from stages.training.batch import Group, TokenBatch
from stages.training.metrics import Mean
from stages.training.model import token_logprobs
from stages.training.objective import Forward
from stages.training.pairs import Reference


@dataclass(frozen=True)
class PairSettings:
    """What turns tokens into the values that a preference loss compares."""

    beta: float
    divergence: Callable[[Tensor], Tensor] = reverse_kl
    ld_alpha: float | None = None
    """Weight of the tokens beyond the shorter completion's length (LD-DPO, Liu et al., arXiv:2409.06411)."""
    use_weighting: bool = False
    """Weigh pairs by how likely the policy is to write them (WPO)."""
    reward: Callable[[PairLogprobs], tuple[Tensor, Tensor]] = PairLogprobs.log_ratios
    """What implicit rewards are beta times of: (chosen [B], rejected [B])."""
    metrics: Mapping[str, Callable[[PairLogprobs], Tensor]] = field(default_factory=dict)
    """Further metrics of the losses: [B] each."""


@dataclass(frozen=True)
class Coupled:
    """A pair within a loss over the whole step: its reference, its loss, and the slopes at its two sums."""

    reference: Reference
    loss: float
    chosen_slope: float
    rejected_slope: float


class PreferenceLoss:
    """A preference loss over log-probability sums; the groups carry `Reference`, or `Coupled`, as their data."""

    def __init__(self, loss: Callable[[PairLogprobs], Tensor], settings: PairSettings) -> None:
        self.loss, self.settings = loss, settings
        self.metric_names: Sequence[str] = (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "mean_token_accuracy",
            "entropy",
            *settings.metrics,
        )

    def count(self, group: Group) -> float:
        """One pair."""
        return 1

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(sum of the pairs' losses, TRL's DPO metrics).

        Without TRL's `logits/*`: adding a number to all logits changes none of the model's probabilities. `logps/*` are
        of whole completions under every loss; TRL's are of a token where the loss is (simpo, alphapo, orpo, tpo_l).
        """
        readout = token_logprobs(batch, with_entropy=True, with_squares=self.settings.use_weighting)
        scores: TokenScores = forward(batch, readout)
        pairs = pair_logprobs(batch, scores.logprobs_N, self.settings)
        coupled = isinstance(batch.groups[0].data, Coupled)
        losses_B = self.losses(batch, pairs, scores)
        return losses_B.sum(), self._metrics(batch, pairs, scores, with_parts=not coupled)

    def losses(self, batch: TokenBatch, pairs: PairLogprobs, scores: TokenScores) -> Tensor:
        """[B]."""
        coupled = isinstance(batch.groups[0].data, Coupled)
        losses_B = coupled_losses(batch, pairs) if coupled else self.loss(pairs)
        return losses_B * on_policy_weights(batch, scores) if self.settings.use_weighting else losses_B

    @torch.no_grad()
    def _metrics(
        self, batch: TokenBatch, pairs: PairLogprobs, scores: TokenScores, *, with_parts: bool
    ) -> dict[str, Mean]:
        chosen_B, rejected_B = (self.settings.beta * reward_B for reward_B in self.settings.reward(pairs))
        count = len(chosen_B)
        right_K = batch.sum_by_branch(scores.is_likeliest_N.to(chosen_B.dtype))
        assert scores.entropy_N is not None
        metrics = {
            "rewards/chosen": Mean(chosen_B.sum(), count),
            "rewards/rejected": Mean(rejected_B.sum(), count),
            "rewards/accuracies": Mean((chosen_B > rejected_B).sum(), count),
            "rewards/margins": Mean((chosen_B - rejected_B).sum(), count),
            "logps/chosen": Mean(pairs.chosen_B.sum(), count),
            "logps/rejected": Mean(pairs.rejected_B.sum(), count),
            "mean_token_accuracy": Mean(right_K[:: branches_of(batch)].sum(), pairs.chosen_tokens_B.sum()),
            "entropy": Mean(scores.entropy_N.sum(), len(scores.entropy_N)),
        }
        if with_parts:
            metrics |= {name: Mean(part(pairs).sum(), count) for name, part in self.settings.metrics.items()}
        return metrics


def branches_of(batch: TokenBatch) -> int:
    """Completions of every group: two, or three with the gold one."""
    return len(batch.groups[0].branches)


def pair_logprobs(batch: TokenBatch, logprobs_N: Tensor, settings: PairSettings) -> PairLogprobs:
    """Sums over the branches of every pair, beside the references that the groups carry."""
    step, tokens_K = branches_of(batch), batch.tokens_per_branch()
    whole_K = batch.sum_by_branch(logprobs_N)
    sums_K = whole_K
    if settings.ld_alpha is not None:
        sums_K = batch.sum_by_branch(logprobs_N * _tail_weights(batch, tokens_K, settings.ld_alpha))
    data = [group.data for group in batch.groups]
    references = [one.reference if isinstance(one, Coupled) else one for one in data]
    return PairLogprobs(
        chosen_B=sums_K[0::step],
        rejected_B=sums_K[1::step],
        reference_chosen_B=beside([reference.chosen for reference in references], sums_K),
        reference_rejected_B=beside([reference.rejected for reference in references], sums_K),
        chosen_tokens_B=tokens_K[0::step],
        rejected_tokens_B=tokens_K[1::step],
        whole_chosen_B=whole_K[0::step],
        gold_B=whole_K[2::step] if step == 3 else None,
        gold_tokens_B=tokens_K[2::step] if step == 3 else None,
        divergence=settings.divergence,
    )


def _tail_weights(batch: TokenBatch, tokens_K: Tensor, alpha: float) -> Tensor:
    """[N] 1 up to the length of the pair's shorter completion, alpha beyond."""
    step = branches_of(batch)
    shared_B = torch.minimum(tokens_K[0::step], tokens_K[1::step])
    starts_K = tokens_K.cumsum(0) - tokens_K
    places_N = torch.arange(len(batch.branch_N), device=tokens_K.device) - starts_K[batch.branch_N]
    beyond_N = places_N >= shared_B.repeat_interleave(step)[batch.branch_N]
    return torch.where(beyond_N, alpha, 1.0)


@torch.no_grad()
def on_policy_weights(batch: TokenBatch, scores: TokenScores) -> Tensor:
    """[B] w(chosen) w(rejected), w(y) = exp(mean_t(log p(y_t) - log sum_v p_v^2)), without a gradient.

    Zhou et al., arXiv:2406.11827, eq. 2: how likely the policy is to write a completion, against what it would be
    for one that it had drawn.
    """
    assert scores.log_squares_N is not None
    means_K = batch.sum_by_branch(scores.logprobs_N - scores.log_squares_N) / batch.tokens_per_branch()
    step = branches_of(batch)
    return (means_K[0::step] + means_K[1::step]).exp()


def coupled_losses(batch: TokenBatch, pairs: PairLogprobs) -> Tensor:
    """[B] the losses that the groups carry, with the gradient that their slopes say."""
    known: list[Coupled] = [group.data for group in batch.groups]
    slopes = [[one.chosen_slope for one in known], [one.rejected_slope for one in known]]
    slopes_2B = beside(slopes, pairs.chosen_B)
    linear_B = slopes_2B[0] * pairs.chosen_B + slopes_2B[1] * pairs.rejected_B
    return linear_B + (beside([one.loss for one in known], linear_B) - linear_B).detach()
