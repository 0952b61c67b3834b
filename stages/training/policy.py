"""The objective of on-line reinforcement learning: a clipped policy gradient over sampled completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.losses.logprobs import TokenScores
from stages.losses.policy import LOG_RATIOS, Aggregation, clipped, clipped_tokens, kl_k3, token_log_ratios
from stages.losses.token_loss import TokenLossFunction
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.model import token_logprobs, token_losses
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


@dataclass(frozen=True)
class Known:
    """What a batch's losses depend on besides its log-probabilities, token by token; floats are float64."""

    advantages_N: Tensor
    weights_N: Tensor
    branch_N: Tensor
    old_N: Tensor | None
    """None: on policy."""
    reference_N: Tensor | None
    num_branches: int

    @classmethod
    def of(cls, batch: TokenBatch, settings: PolicySettings) -> Known:
        """From the rollouts that the batch's groups carry."""
        rollouts: list[Rollouts] = [group.data for group in batch.groups]
        advantages_K = torch.tensor([value for group in rollouts for value in group.advantages], dtype=torch.float64)
        weights_N = settings.aggregation.weights(
            batch.tokens_per_branch(), batch.branch_N, settings.max_completion_length, torch.float64
        )
        on_policy = rollouts[0].old_logprobs is None
        return cls(
            advantages_N=advantages_K.to(weights_N.device).index_select(0, batch.branch_N),
            weights_N=weights_N,
            branch_N=batch.branch_N,
            old_N=None if on_policy else _tokens(batch, lambda group: group.old_logprobs),
            reference_N=_tokens(batch, lambda group: group.reference_logprobs) if settings.beta else None,
            num_branches=batch.num_branches,
        )

    def of_part(self, part: slice, dtype: torch.dtype) -> Known:
        """The tokens of a slice, floats in a type."""
        cut = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        floats: dict[str, Any] = {name: value.to(dtype) for name, value in cut.items() if value.is_floating_point()}
        return replace(self, branch_N=cut["branch_N"], **floats)


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
        self.log_ratios = LOG_RATIOS[settings.importance_sampling_level]

    def count(self, group: Group) -> float:
        """Sequences or tokens, as the aggregation says."""
        aggregation = self.settings.aggregation
        return len(group.branches) if aggregation.unit == "sequence" else asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(weighted sum of token losses, metrics)."""
        known = Known.of(batch, self.settings)
        loss, scores = self._loss(forward, batch, known)
        with torch.no_grad():
            return loss, self._metrics(batch, known, scores)

    def _loss(self, forward: Forward, batch: TokenBatch, known: Known) -> tuple[Tensor, TokenScores]:
        """Token by token, unless a token's loss hangs on other tokens' log-probabilities."""
        temperature = self.settings.temperature
        if known.old_N is not None and self.log_ratios is not token_log_ratios:
            scores: TokenScores = forward(batch, token_logprobs(batch, temperature=temperature, with_entropy=True))
            return self._losses(known, scores.logprobs_N, slice(None)).sum(), scores
        token_loss = self._first_losses(known) if known.old_N is None else partial(self._losses, known)
        local: tuple[Tensor, TokenScores] = forward(batch, token_losses(batch, token_loss, temperature=temperature))
        return local

    def _losses(self, known: Known, logprobs_C: Tensor, part: slice) -> Tensor:
        """Weighted losses of the tokens of a slice."""
        known = known.of_part(part, logprobs_C.dtype)
        assert known.old_N is not None
        return self._surrogates(known, logprobs_C - known.old_N) + self._penalties(known, logprobs_C)

    def _first_losses(self, known: Known) -> TokenLossFunction:
        """The same on policy. All ratios are 1, so values and slopes follow before any log-probability is known."""
        changes_N = torch.zeros_like(known.weights_N, requires_grad=True)
        values_N = self._surrogates(known, changes_N)
        (slopes_N,) = torch.autograd.grad(values_N.sum(), changes_N)

        def losses(logprobs_C: Tensor, part: slice) -> Tensor:
            values_C, slopes_C = (known_N[part].to(logprobs_C.dtype) for known_N in (values_N.detach(), slopes_N))
            surrogates_C = values_C + slopes_C * (logprobs_C - logprobs_C.detach())
            return surrogates_C + self._penalties(known.of_part(part, logprobs_C.dtype), logprobs_C)

        return losses

    def _surrogates(self, known: Known, changes_N: Tensor) -> Tensor:
        """Of log-probabilities that have changed by `changes_N` since they were sampled."""
        ratios_N = self._ratios(known, changes_N)
        settings = self.settings
        return known.weights_N * clipped(
            ratios_N, known.advantages_N, epsilon=settings.epsilon, epsilon_high=settings.epsilon_high
        )

    def _ratios(self, known: Known, changes_N: Tensor) -> Tensor:
        return self.log_ratios(changes_N, torch.zeros_like(changes_N), known.branch_N, known.num_branches)

    def _penalties(self, known: Known, logprobs_N: Tensor) -> Tensor:
        """Weighted KL terms; zeros without a reference."""
        if known.reference_N is None:
            return torch.zeros_like(logprobs_N)
        return known.weights_N * self.settings.beta * kl_k3(logprobs_N, known.reference_N)

    def _metrics(self, batch: TokenBatch, known: Known, scores: TokenScores) -> dict[str, Mean]:
        settings, logprobs_N = self.settings, scores.logprobs_N
        known = known.of_part(slice(None), logprobs_N.dtype)
        old_N = logprobs_N if known.old_N is None else known.old_N
        low_N, high_N = clipped_tokens(
            self._ratios(known, logprobs_N - old_N),
            known.advantages_N,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
        )
        sums = {"clip_ratio/low_mean": low_N.sum(), "clip_ratio/high_mean": high_N.sum()}
        if scores.entropy_N is not None:
            sums["entropy"] = scores.entropy_N.sum()
        if known.reference_N is not None:
            sums["kl"] = kl_k3(logprobs_N, known.reference_N).sum()
        if settings.tolerance is not None and known.old_N is None:
            sums["sampling/sampling_logp_difference/mean"] = self._compare(batch, logprobs_N, settings.tolerance)
        return {name: Mean(total, len(logprobs_N)) for name, total in sums.items()}

    def _compare(self, batch: TokenBatch, logprobs_N: Tensor, tolerance: float) -> Tensor:
        """Summed differences of sampler and trainer, on policy; they must agree.

        Raises StageError where one is beyond the tolerance: stale weights, or different numerics.
        """
        sampled_N = _tokens(batch, lambda group: group.sampled_logprobs).to(logprobs_N.dtype)
        differences_N = (logprobs_N - sampled_N).abs()
        worst = int(differences_N.argmax())
        if float(differences_N[worst]) > tolerance:
            row = batch.groups[self._group_of(batch, int(batch.branch_N[worst]))].row_id
            raise StageError(
                f"the sampler gave token {int(batch.target_N[worst])} of a completion of row {row} log-probability "
                f"{float(sampled_N[worst]):.4f}, the trainer {float(logprobs_N[worst]):.4f}: the sampler has other "
                "weights, or computes differently"
            )
        return differences_N.sum()

    @staticmethod
    def _group_of(batch: TokenBatch, branch: int) -> int:
        for index, group in enumerate(batch.groups):
            branch -= len(group.branches)
            if branch < 0:
                return index
        raise AssertionError("a branch belongs to a group")


def _tokens(batch: TokenBatch, field: Callable[[Rollouts], tuple[list[float], ...] | None]) -> Tensor:
    """[N] float64: per-token values of all branches one after the other, as the batch lays them out."""
    values = []
    for group in batch.groups:
        branches = field(group.data)
        assert branches is not None
        values += [value for branch in branches for value in branch]
    return torch.tensor(values, dtype=torch.float64).to(batch.target_N.device, non_blocking=True)
