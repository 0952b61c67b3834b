"""The terms of a policy's loss as functions of log-probabilities: surrogate, corrections, and the KL term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.losses.policy import Surrogate
from stages.losses.policy_correction import Correction, on_policy_enough
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import LOG_RATIOS, PolicyTokens, ratios, token_log_ratios
from stages.losses.token_loss import TokenLossFunction
from stages.training.batch import TokenBatch
from stages.training.policy_known import Known


@dataclass(frozen=True)
class PolicySettings:
    """How log-probabilities and advantages become a loss."""

    loss: Surrogate
    temperature: float
    max_completion_length: int
    tolerance: float | None
    """Largest difference between sampler and trainer on policy, in nats a token; beyond it they are out of step.
    None: the sampler did not draw from the plain distribution (top-p and the like), so its numbers do not compare."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Of the loss; what is not there is its own default."""
    importance_sampling_level: str | None = None
    """None: the loss's own."""
    beta: float = 0.0
    """Weight of the KL term in the loss; at 0 it has none."""
    compares_reference: bool = False
    """Log the divergence from a reference that is not in the loss."""
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    correction: Correction | None = None
    off_policy_mask_threshold: float | None = None


class PolicyTerms:
    """Losses of the tokens of a batch (`Known`), weighted by the aggregation, so that they are only summed up."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.surrogate = settings.loss.with_settings(settings.parameters)
        self.log_ratios = LOG_RATIOS[settings.importance_sampling_level or settings.loss.level]
        self.kl = KL_ESTIMATORS[settings.kl_estimator]

    def known(self, batch: TokenBatch) -> Known:
        """From the rollouts that the batch's groups carry."""
        settings = self.settings
        correction, on_policy = settings.correction, batch.groups[0].data.old_logprobs is None
        compared = settings.tolerance is not None and on_policy
        known = Known.of(
            batch,
            settings.loss.aggregation,
            settings.max_completion_length,
            reference=bool(settings.beta) or settings.compares_reference,
            sampled=compared or correction is not None or settings.off_policy_mask_threshold is not None,
        )
        if correction is None or known.old_N is None or known.sampled_N is None:
            return known
        return replace(known, corrections_N=correction(known.old_N, known.sampled_N, known.sequences))

    def together(self, known: Known) -> bool:
        """Whether the slope of a token's loss needs other tokens' log-probabilities."""
        settings = self.settings
        by_token = self.log_ratios is token_log_ratios and not settings.loss.couples_tokens
        if settings.off_policy_mask_threshold is not None:
            return True
        if settings.beta and settings.use_bias_correction_kl and not by_token:
            return True
        if known.old_N is not None:
            return not by_token
        # on policy the slopes of sequences are known beforehand too, but not what the sampler makes of their tokens
        return settings.correction is not None and not (by_token and settings.correction.mode.of_single_tokens)

    def losses(self, known: Known, logprobs_C: Tensor, part: slice) -> Tensor:
        """[C] of the tokens of a slice; of all, where they hang `together`."""
        known = known.of_part(part, logprobs_C.dtype)
        tokens = self.tokens(known, logprobs_C)
        losses_C = self._bounded(known, tokens, self._surrogates(known, tokens))
        return losses_C + self._penalties(known, tokens)

    def first_losses(self, known: Known) -> TokenLossFunction:
        """The same on policy. All ratios are 1, so values and slopes follow before any log-probability is known."""
        changes_N = torch.zeros_like(known.weights_N, requires_grad=True)
        logprobs_N = torch.zeros_like(known.weights_N, requires_grad=True)
        values_N = self._surrogates(known, self._of_changes(known, changes_N, logprobs_N))
        of_changes_N, of_logprobs_N = torch.autograd.grad(values_N.sum(), (changes_N, logprobs_N), allow_unused=True)

        def losses(logprobs_C: Tensor, part: slice) -> Tensor:
            own = known.of_part(part, logprobs_C.dtype)
            tokens = self.tokens(own, logprobs_C)
            surrogates_C = values_N.detach()[part].to(logprobs_C.dtype)
            if of_changes_N is not None:
                surrogates_C = surrogates_C + of_changes_N[part].to(logprobs_C.dtype) * tokens.changes_N
            if of_logprobs_N is not None:  # of losses that are linear in the log-probability
                surrogates_C = surrogates_C + of_logprobs_N[part].to(logprobs_C.dtype) * logprobs_C
            return self._bounded(own, tokens, surrogates_C) + self._penalties(own, tokens)

        return losses

    def tokens(self, known: Known, logprobs_N: Tensor) -> PolicyTokens:
        """The tokens of a slice as the losses see them."""
        old_N = logprobs_N.detach() if known.old_N is None else known.old_N
        tokens = self._of_changes(known, logprobs_N - old_N, logprobs_N)
        if self.settings.correction is None or tokens.corrections_N is not None:
            return tokens
        assert known.sampled_N is not None
        return replace(tokens, corrections_N=self.settings.correction(old_N, known.sampled_N, known.sequences))

    def _of_changes(self, known: Known, changes_N: Tensor, logprobs_N: Tensor) -> PolicyTokens:
        """Of log-probabilities that have changed by `changes_N` since they were sampled."""
        return PolicyTokens(
            log_ratios_N=self.log_ratios(changes_N, known.sequences),
            changes_N=changes_N,
            logprobs_N=logprobs_N,
            advantages_N=known.advantages_N,
            sequences=known.sequences,
            kept_N=known.kept_N,
            corrections_N=known.corrections_N,
        )

    def _surrogates(self, known: Known, tokens: PolicyTokens) -> Tensor:
        losses_N = known.weights_N * self.surrogate(tokens)
        return losses_N if known.kept_N is None else losses_N * known.kept_N

    def _bounded(self, known: Known, tokens: PolicyTokens, surrogates_N: Tensor) -> Tensor:
        """What counts of the surrogates where the sampler was not quite the policy, or no longer is."""
        if tokens.corrections_N is not None and not self.settings.loss.weighs_corrections:
            surrogates_N = surrogates_N * tokens.corrections_N
        threshold = self.settings.off_policy_mask_threshold
        if threshold is None:
            return surrogates_N
        assert known.sampled_N is not None
        enough_N = on_policy_enough(tokens.logprobs_N, known.sampled_N, known.advantages_N, known.sequences, threshold)
        return surrogates_N * enough_N

    def _penalties(self, known: Known, tokens: PolicyTokens) -> Tensor:
        """Weighted KL terms; zeros where beta is."""
        if not self.settings.beta:
            return torch.zeros_like(tokens.logprobs_N)
        return known.weights_N * self.settings.beta * self.divergences(known, tokens)

    def divergences(self, known: Known, tokens: PolicyTokens) -> Tensor:
        """[N] estimates of the KL divergence from the reference, as the loss has them."""
        assert known.reference_N is not None
        kl_N = self.kl(tokens.logprobs_N, known.reference_N)
        return kl_N * ratios(tokens.log_ratios_N) if self.settings.use_bias_correction_kl else kl_N
