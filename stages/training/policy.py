"""The objective of on-line reinforcement learning: a policy gradient over sampled completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stages.losses.logprobs import TokenScores
from stages.training.batch import Group, TokenBatch
from stages.training.entropy_bonus import EntropyBonus
from stages.training.entropy_readouts import token_logprobs_with_entropy, token_losses_with_entropy
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Extreme, Mean
from stages.training.model import token_logprobs, token_losses
from stages.training.objective import Forward
from stages.training.policy_known import Known
from stages.training.policy_terms import PolicySettings, PolicyTerms
from stages.training.worst_difference import LARGEST, WorstDifference


class PolicyLoss:
    """A loss of `POLICY_LOSSES` with an optional KL term to a reference, and an optional entropy bonus."""

    extremes: Mapping[str, int] = MappingProxyType(
        {
            LARGEST: 1,
            "sampling/importance_sampling_ratio/min": -1,
            "sampling/importance_sampling_ratio/max": 1,
        }
    )

    def __init__(self, settings: PolicySettings, bonus: EntropyBonus | None = None) -> None:
        self.settings, self.bonus, self.terms = settings, bonus, PolicyTerms(settings)
        self.metrics = settings.loss.metrics_with(settings.parameters)
        self.worst = WorstDifference(settings.tolerance, "trainer")
        self.metric_names: Sequence[str] = (
            "entropy",
            "kl",
            *self.metrics,
            "sampling/sampling_logp_difference/mean",
            "sampling/importance_sampling_ratio/mean",
            "policy_loss",
            "entropy/kept",
        )

    def count(self, group: Group) -> float:
        """Sequences or tokens, as the aggregation says."""
        aggregation = self.settings.loss.aggregation
        return len(group.branches) if aggregation.unit == "sequence" else asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(weighted sum of token losses, metrics)."""
        known = self.terms.known(batch)
        weights_N = self._entropy_weights(batch, known)
        loss, scores = self._loss(forward, batch, known, weights_N)
        with torch.no_grad():
            metrics = self._metrics(batch, known, scores)
            if weights_N is not None and scores.entropy_N is not None:
                bonus = (weights_N.to(scores.entropy_N.dtype) * scores.entropy_N).sum()
                metrics["policy_loss"] = Mean(loss.detach() - bonus, sum(self.count(group) for group in batch.groups))
            return loss, metrics

    def concluded(self, means: Mapping[str, float]) -> dict[str, float]:
        """The coefficient of the entropy, which may follow the step's. Raises StageError where sampler and trainer
        differ by more than the tolerance on policy: stale weights, or different numerics."""
        self.worst.require(means)
        if self.bonus is None:
            return {}
        seen = means.get("entropy/kept", means.get("entropy"))
        if seen is not None:
            self.bonus.follow(seen)
        return {"entropy_coef": self.bonus.coefficient}

    def state(self) -> dict[str, Any]:
        """What a resumed run must know of the steps before."""
        return {} if self.bonus is None else self.bonus.state()

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        if self.bonus is not None and state:
            self.bonus.load(state)

    def _entropy_weights(self, batch: TokenBatch, known: Known) -> Tensor | None:
        """[N]: what a token's entropy counts in the loss; None without a bonus."""
        if self.bonus is None:
            return None
        share = batch.groups[0].data.entropy_share
        assert share is not None, "groups of a loss with an entropy bonus go through StepEntropy"
        weights_N = torch.full_like(known.weights_N, -self.bonus.applied() * share)
        return weights_N if known.kept_N is None else weights_N * known.kept_N

    def _loss(
        self, forward: Forward, batch: TokenBatch, known: Known, weights_N: Tensor | None
    ) -> tuple[Tensor, TokenScores]:
        """Token by token, unless a token's loss hangs on other tokens' log-probabilities."""
        temperature, terms = self.settings.temperature, self.terms
        scores: TokenScores
        if not terms.together(known):
            token_loss = terms.first_losses(known) if known.old_N is None else partial(terms.losses, known)
            readout = (
                token_losses(batch, token_loss, temperature=temperature)
                if weights_N is None
                else token_losses_with_entropy(batch, token_loss, weights_N, temperature=temperature)
            )
            loss, scores = forward(batch, readout)
            return loss, scores
        if weights_N is None:
            scores = forward(batch, token_logprobs(batch, temperature=temperature, with_entropy=True))
            return terms.losses(known, scores.logprobs_N, slice(None)).sum(), scores
        bonus, scores = forward(batch, token_logprobs_with_entropy(batch, weights_N, temperature=temperature))
        return terms.losses(known, scores.logprobs_N, slice(None)).sum() + bonus, scores

    def _metrics(self, batch: TokenBatch, known: Known, scores: TokenScores) -> dict[str, Mean]:
        logprobs_N, entropy_N = scores.logprobs_N, scores.entropy_N
        known = known.of_part(slice(None), logprobs_N.dtype)
        tokens = self.terms.tokens(known, logprobs_N)
        found = {name: metric(tokens) for name, metric in self.metrics.items()}
        if entropy_N is not None:
            found["entropy"] = entropy_N
        if known.reference_N is not None:
            found["kl"] = self.terms.divergences(known, tokens)
        if (correction := self.settings.correction) is not None and tokens.corrections_N is not None:
            ratios = correction.measured(tokens.corrections_N, tokens.sequences)
            found["sampling/importance_sampling_ratio/mean"] = ratios
        if (differences_N := self._differences(batch, known, logprobs_N)) is not None:
            found["sampling/sampling_logp_difference/mean"] = differences_N
        metrics: dict[str, Mean] = {name: Mean(values.sum(), values.numel()) for name, values in found.items()}
        for name, sign in self.extremes.items():
            values = found.get(f"{name.rpartition('/')[0]}/mean")
            if values is not None and len(values):
                metrics[name] = Extreme(values.max() if sign > 0 else values.min(), 1)
        if entropy_N is not None and known.kept_N is not None:
            metrics["entropy/kept"] = Mean((entropy_N * known.kept_N).sum(), known.kept_N.sum())
        return metrics

    def _differences(self, batch: TokenBatch, known: Known, logprobs_N: Tensor) -> Tensor | None:
        """[N] between sampler and trainer at sampling time, where they compare or are corrected for."""
        if known.sampled_N is None:
            return None
        if known.old_N is None:
            self.worst.note(batch, known.sampled_N, logprobs_N)
        old_N = logprobs_N if known.old_N is None else known.old_N
        return (old_N - known.sampled_N).abs()
