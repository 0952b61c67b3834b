"""What is done about completions that the policy would not have sampled quite so.

The sampler computes differently from the trainer, samples from a cut distribution, or has older weights. N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.losses.policy_tokens import (
    LogRatios,
    Sequences,
    ratios,
    sequence_mean_log_ratios,
    sequence_sum_log_ratios,
    token_log_ratios,
)

if TYPE_CHECKING:
    from torch import Tensor

_NEVER_SAMPLED = 1e30
"""The log-ratio of a token that the sampler says it never takes: beyond all others, and yet a number, so that it can
be summed with one that the trainer never takes, which is minus infinity."""


def truncated(ratios_N: Tensor, lowest: float, highest: float) -> Tensor:
    """Ratios beyond the bounds count as the bounds. Truncated importance sampling (Yao et al. 2025)."""
    return ratios_N.clamp(lowest, highest)


def masked(ratios_N: Tensor, lowest: float, highest: float) -> Tensor:
    """Ratios beyond the bounds count as 0. Masked importance sampling; IcePop, arXiv:2510.18855."""
    return ratios_N.masked_fill((ratios_N < lowest) | (ratios_N > highest), 0.0)


@dataclass(frozen=True)
class Mode:
    """How ratios of trainer to sampler are formed and bounded."""

    level: LogRatios
    bound: Callable[[Tensor, float, float], Tensor]

    @property
    def of_single_tokens(self) -> bool:
        """Whether a token's ratio follows from its own log-probabilities."""
        return self.level is token_log_ratios


MODES: dict[str, Mode] = {
    "token_truncate": Mode(token_log_ratios, truncated),
    "token_mask": Mode(token_log_ratios, masked),
    "sequence_truncate": Mode(sequence_sum_log_ratios, truncated),
    "sequence_mask": Mode(sequence_sum_log_ratios, masked),
    "geometric_truncate": Mode(sequence_mean_log_ratios, truncated),
    "geometric_mask": Mode(sequence_mean_log_ratios, masked),
}
"""`importance_sampling_mode`: of a token, of a sequence (the product of its tokens' ratios), or of a sequence's
geometric mean; truncated at the bounds, or masked beyond them."""


@dataclass(frozen=True)
class Correction:
    """Multiplies the policy term by pi_old / pi_sampler, bounded."""

    mode: Mode
    clip_min: float | None
    clip_max: float | None

    def __call__(self, old_logprobs_N: Tensor, sampled_logprobs_N: Tensor, sequences: Sequences) -> Tensor:
        """[N], without a gradient. Where the sampler gave no log-probability (NaN) it counts as the trainer's.
        A sequence of a token that the trainer would never have taken has a ratio of 0, whatever its others."""
        differences_N = (old_logprobs_N - sampled_logprobs_N).detach()
        differences_N = differences_N.nan_to_num(nan=0.0, posinf=_NEVER_SAMPLED, neginf=-math.inf)
        ratios_N = ratios(self.mode.level(differences_N, sequences))
        lowest = 0.0 if self.clip_min is None else self.clip_min
        return self.mode.bound(ratios_N, lowest, math.inf if self.clip_max is None else self.clip_max)

    def measured(self, ratios_N: Tensor, sequences: Sequences) -> Tensor:
        """Of its ratios, what metrics are of: one a token, or a sequence (1 for one without tokens), as in TRL."""
        if self.mode.of_single_tokens:
            return ratios_N
        return sequences.means(ratios_N) + (sequences.lengths() == 0)


def on_policy_enough(
    logprobs_N: Tensor, sampled_logprobs_N: Tensor, advantages_N: Tensor, sequences: Sequences, threshold: float
) -> Tensor:
    """[N] bool: false for the tokens of completions worse than their baseline that the policy has moved away from.

    DeepSeek-V3.2's off-policy sequence mask, arXiv:2512.02556, eq. 9: kept where A >= 0, or where the mean of
    log pi_sampler - log pi over the completion is at most `threshold`.
    """
    differences_N = (sampled_logprobs_N - logprobs_N.detach()).nan_to_num(nan=0.0)
    means_N = sequences.to_tokens(sequences.means(differences_N))
    return (advantages_N >= 0) | (means_N <= threshold)
