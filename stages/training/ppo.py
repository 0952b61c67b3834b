"""The objective of PPO: a clipped policy gradient and a clipped value loss over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from stages.losses.logprobs import TokenScores
from stages.losses.policy import clipped, clipped_high, clipped_low
from stages.losses.policy_tokens import PolicyTokens, Sequences, ratios
from stages.losses.value import clipped_value, clipped_values
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.metrics import Mean
from stages.training.objective import Forward
from stages.training.policy_known import token_values
from stages.training.value_model import policy_loss_and_values


@dataclass(frozen=True)
class PpoSettings:
    """How log-probabilities and values become a loss; fields of the stage."""

    temperature: float
    cliprange: float
    vf_coef: float
    cliprange_value: float


@dataclass(frozen=True)
class Targets:
    """What is known of a batch's tokens from sampling time, [N] float64."""

    old_N: Tensor | None
    """Log-probabilities under the policy at sampling time; None: this is the first step on them, all ratios are 1."""
    advantages_N: Tensor
    values_N: Tensor
    returns_N: Tensor
    sequences: Sequences

    @classmethod
    def of(cls, batch: TokenBatch) -> Targets:
        """From the valued rollouts that the batch's groups carry."""
        on_policy = batch.groups[0].data.old_logprobs is None
        return cls(
            old_N=None if on_policy else token_values(batch, attrgetter("old_logprobs")),
            advantages_N=token_values(batch, attrgetter("token_advantages")),
            values_N=token_values(batch, attrgetter("values")),
            returns_N=token_values(batch, attrgetter("returns")),
            sequences=Sequences(batch.branch_N, batch.num_branches),
        )

    def tokens(self, logprobs_C: Tensor, part: slice) -> PolicyTokens:
        """The tokens of a slice under the present policy."""
        dtype = logprobs_C.dtype
        old_C = logprobs_C.detach() if self.old_N is None else self.old_N[part].to(dtype)
        changes_C = logprobs_C - old_C
        sequences = Sequences(self.sequences.of_N[part], self.sequences.count)
        return PolicyTokens(changes_C, changes_C, logprobs_C, self.advantages_N[part].to(dtype), sequences)


class PpoLoss:
    """Schulman et al., arXiv:1707.06347, eq. 9, without its entropy bonus; the mean over the tokens of a step."""

    metric_names: Sequence[str] = (
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "entropy",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
    )

    def __init__(self, settings: PpoSettings) -> None:
        self.settings = settings

    def count(self, group: Group) -> float:
        """Tokens."""
        return asked_tokens(group)

    def __call__(self, forward: Forward, batch: TokenBatch) -> tuple[Tensor, dict[str, Mean]]:
        """(summed policy loss + vf_coef x summed value loss, TRL's PPO metrics).

        Without TRL's `val/ratio_var`: it is a variance of micro-batches' means, which says how a step was cut up. Half
        the mean square of log-ratios is `policy/approxkl_avg`, so twice that is about the variance of ratios.
        """
        settings, targets = self.settings, Targets.of(batch)

        def token_loss(logprobs_C: Tensor, part: slice) -> Tensor:
            return clipped(targets.tokens(logprobs_C, part), epsilon=settings.cliprange)

        readout = policy_loss_and_values(batch, token_loss, temperature=settings.temperature)
        policy_loss, scores, values_N = forward(batch, readout)
        old_N, returns_N = targets.values_N.to(values_N.dtype), targets.returns_N.to(values_N.dtype)
        value_loss = clipped_value(values_N, old_N, returns_N, cliprange_value=settings.cliprange_value).sum()
        with torch.no_grad():
            clips_N = clipped_values(values_N, old_N, returns_N, cliprange_value=settings.cliprange_value)
            sums = self._sums(targets, scores) | {
                "loss/policy_avg": policy_loss.detach(),
                "loss/value_avg": value_loss.detach(),
                "val/clipfrac_avg": clips_N.sum(),
            }
        metrics = {name: Mean(total, len(values_N)) for name, total in sums.items()}
        return policy_loss + settings.vf_coef * value_loss, metrics

    def _sums(self, targets: Targets, scores: TokenScores) -> dict[str, Tensor]:
        tokens, epsilon = targets.tokens(scores.logprobs_N, slice(None)), self.settings.cliprange
        assert scores.entropy_N is not None
        return {
            "policy/approxkl_avg": tokens.changes_N.square().sum() / 2,
            "policy/clipfrac_avg": (clipped_low(tokens, epsilon=epsilon) | clipped_high(tokens, epsilon=epsilon)).sum(),
            "policy/entropy_avg": scores.entropy_N.sum(),
            "entropy": scores.entropy_N.sum(),
            "val/ratio": ratios(tokens.changes_N).sum(),
        }
