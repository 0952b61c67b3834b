"""The objective of on-line reinforcement learning: a clipped policy gradient over sampled completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.policy import LOG_RATIOS, Aggregation, clipped, clipped_tokens, kl_k3
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.model import token_logprobs
from stages.training.objective import Forward


@dataclass(frozen=True)
class Rollouts:
    """What is known of a group's completions, one entry a branch; lists of floats are per asked-for token."""

    advantages: tuple[float, ...]
    sampled_logprobs: tuple[list[float], ...]
    """Under the sampler, of the distribution that it sampled from."""
    old_logprobs: tuple[list[float], ...] | None = None
    """Under the policy at sampling time; None: this is the first step on them, where they equal the policy's."""
    reference_logprobs: tuple[list[float], ...] | None = None


@dataclass(frozen=True)
class PolicySettings:
    """How log-probabilities and advantages become a loss."""

    aggregation: Aggregation
    temperature: float
    epsilon: float
    epsilon_high: float | None
    beta: float
    max_completion_length: int
    importance_sampling_level: str
    tolerance: float | None
    """Largest difference between sampler and trainer on policy, in nats a token; beyond it they are out of step.
    None: the sampler did not draw from the plain distribution (top-p and the like), so its numbers do not compare."""


class PolicyLoss:
    """Clipped surrogate (PPO, GRPO) with an optional KL term to a reference."""

    metric_names: Sequence[str] = (
        "entropy",
        "kl",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "sampling/sampling_logp_difference/mean",
    )

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings

    def count(self, group: Group) -> float:
        """Sequences or tokens, as the aggregation says."""
        aggregation = self.settings.aggregation
        return len(group.branches) if aggregation.unit == "sequence" else asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(weighted sum of token losses, metrics)."""
        settings = self.settings
        logprobs_N, entropy_N, _ = forward(batch, token_logprobs(batch, temperature=settings.temperature))
        known = [group.data for group in batch.groups]
        on_policy = known[0].old_logprobs is None
        old_N = logprobs_N.detach() if on_policy else _tokens(known, lambda rollouts: rollouts.old_logprobs, logprobs_N)
        advantages_K = logprobs_N.new_tensor([value for rollouts in known for value in rollouts.advantages])
        advantages_N = advantages_K.index_select(0, batch.branch_N)
        ratios_N = LOG_RATIOS[settings.importance_sampling_level](logprobs_N, old_N, batch.branch_N, batch.num_branches)
        low, high = settings.epsilon, settings.epsilon_high
        losses_N = clipped(ratios_N, advantages_N, epsilon=low, epsilon_high=high)
        low_N, high_N = clipped_tokens(ratios_N, advantages_N, epsilon=low, epsilon_high=high)
        count = len(logprobs_N)
        metrics = {
            "entropy": Mean(entropy_N.sum(), count),
            "clip_ratio/low_mean": Mean(low_N.sum(), count),
            "clip_ratio/high_mean": Mean(high_N.sum(), count),
        }
        if settings.tolerance is not None and on_policy:
            metrics |= self._compare(batch, known, logprobs_N.detach(), settings.tolerance)
        if settings.beta:
            reference_N = _tokens(known, lambda rollouts: rollouts.reference_logprobs, logprobs_N)
            kl_N = kl_k3(logprobs_N, reference_N)
            metrics["kl"] = Mean(kl_N.detach().sum(), count)
            losses_N = losses_N + settings.beta * kl_N
        weights_N = settings.aggregation.weights(
            batch.tokens_per_branch(), batch.branch_N, settings.max_completion_length, logprobs_N.dtype
        )
        return (losses_N * weights_N).sum(), metrics

    def _compare(
        self, batch: TokenBatch, known: Sequence[Rollouts], logprobs_N: Tensor, tolerance: float
    ) -> dict[str, Mean]:
        """On policy, sampler and trainer must agree; a difference means stale weights or different numerics."""
        sampled_N = _tokens(known, lambda rollouts: rollouts.sampled_logprobs, logprobs_N)
        differences_N = (logprobs_N - sampled_N).abs()
        worst = int(differences_N.argmax())
        if float(differences_N[worst]) > tolerance:
            row = batch.groups[self._group_of(batch, int(batch.branch_N[worst]))].row_id
            raise StageError(
                f"the sampler gave token {int(batch.target_N[worst])} of a completion of row {row} log-probability "
                f"{float(sampled_N[worst]):.4f}, the trainer {float(logprobs_N[worst]):.4f}: the sampler has other "
                "weights, or computes differently"
            )
        return {"sampling/sampling_logp_difference/mean": Mean(differences_N.sum(), len(differences_N))}

    @staticmethod
    def _group_of(batch: TokenBatch, branch: int) -> int:
        for index, group in enumerate(batch.groups):
            branch -= len(group.branches)
            if branch < 0:
                return index
        raise AssertionError("a branch belongs to a group")


def _tokens(
    known: Sequence[Rollouts], field: Callable[[Rollouts], tuple[list[float], ...] | None], like: Tensor
) -> Tensor:
    """[N]: per-token values of all branches one after the other, as the batch lays them out."""
    values = []
    for rollouts in known:
        branches = field(rollouts)
        assert branches is not None
        values += [value for branch in branches for value in branch]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
