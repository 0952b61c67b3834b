"""What a policy loss knows of the tokens of completions, and ratios of new to old probability.

N completion tokens of S sequences, one after the other or in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which of `count` sequences each of N tokens belongs to."""

    of_N: Tensor
    count: int

    def lengths(self) -> Tensor:
        """[S] tokens."""
        # not bincount, which tells the host the largest index first
        return self.of_N.new_zeros(self.count).index_add(0, self.of_N, self.of_N.new_ones(len(self.of_N)))

    def sums(self, values_N: Tensor) -> Tensor:
        """[S]."""
        return values_N.new_zeros(self.count).index_add(0, self.of_N, values_N)

    def means(self, values_N: Tensor) -> Tensor:
        """[S]; 0 for a sequence without tokens."""
        return self.sums(values_N) / self.lengths().clamp(min=1)

    def to_tokens(self, values_S: Tensor) -> Tensor:
        """[N]: each token its sequence's value."""
        return values_S.index_select(0, self.of_N)


@dataclass(frozen=True)
class PolicyTokens:
    """N tokens under the policy, with what is known of them from sampling time."""

    log_ratios_N: Tensor
    """log pi - log pi_old at the chosen level (`LOG_RATIOS`), with a gradient."""
    changes_N: Tensor
    """The same, token by token."""
    logprobs_N: Tensor
    """log pi; a loss is affine in them where it does not go by ratios, so that on policy its slope is known before."""
    advantages_N: Tensor
    sequences: Sequences
    kept_N: Tensor | None = None
    """bool: tokens that are learned from; None: all."""
    corrections_N: Tensor | None = None
    """Importance of the token to a sampler that is not quite pi_old (`policy_correction`); None: 1."""


MOST_LOG_RATIO = 80.0
"""e^80 = 5.5e34 is still a float32; a run that depends on more has run away, and its norms say so."""


def ratios(log_ratios: Tensor) -> Tensor:
    """exp(log-ratio), at most e^80, with its slope; NaN only where the log-ratio is.

    The sum of a sequence's log-ratios passes float32's 88 soon, and the slope of a clip is then 0 times infinity. The
    bound leaves a slope, that of e^80: a completion that has become far too likely still has to become less so.
    """
    powers = log_ratios.detach().clamp(max=MOST_LOG_RATIO).exp()
    return with_slopes(powers, powers, log_ratios)


def with_slopes(values: Tensor, slopes: Tensor, of: Tensor) -> Tensor:
    """The same values, as a function of `of` that has these slopes; all of one shape."""
    finite = of.nan_to_num(nan=math.nan)  # infinity less itself is no number
    return values + slopes * (finite - finite.detach())


LogRatios = Callable[["Tensor", Sequences], "Tensor"]


def token_log_ratios(changes_N: Tensor, sequences: Sequences) -> Tensor:
    """log rho_t = log pi(y_t) - log pi_old(y_t). Returns [N]. PPO and GRPO, arXiv:2402.03300."""
    return changes_N


def sequence_mean_log_ratios(changes_N: Tensor, sequences: Sequences) -> Tensor:
    """Mean of the token log-ratios of the sequence, given to each of its tokens. [N]. GSPO, arXiv:2507.18071,
    eq. 7.
    """
    return sequences.to_tokens(sequences.means(changes_N))


def sequence_sum_log_ratios(changes_N: Tensor, sequences: Sequences) -> Tensor:
    """Sum of the token log-ratios of the sequence, for each of its tokens. [N]. RLOO, arXiv:2402.14740."""
    return sequences.to_tokens(sequences.sums(changes_N))


def sequence_token_log_ratios(changes_N: Tensor, sequences: Sequences) -> Tensor:
    """The sequence's mean as value, the token's own log-ratio as gradient. [N]. GSPO-token, arXiv:2507.18071,
    eq. 14.
    """
    means_N = sequence_mean_log_ratios(changes_N.detach(), sequences)
    return changes_N - changes_N.detach() + means_N


LOG_RATIOS: dict[str, LogRatios] = {
    "token": token_log_ratios,
    "sequence": sequence_mean_log_ratios,
    "sequence_sum": sequence_sum_log_ratios,
    "sequence_token": sequence_token_log_ratios,
}
"""`importance_sampling_level` -> log_ratios(log-ratios of the tokens [N], sequences) -> [N]."""
