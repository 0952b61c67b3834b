"""Policy-gradient losses: one value per completion token.

N completion tokens of S sequences, one after the other or in any order; `sequence_N` says which sequence a
token belongs to. A loss gives [N]; an `Aggregation` says what one item is (a token or a sequence) and each
token's weight. The objective returns sum(loss * weight), the loop divides once by the items of the whole
step, over all micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def token_log_ratios(logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """log rho_t = log pi(y_t) - log pi_old(y_t). Returns [N]. PPO and GRPO, arXiv:2402.03300."""
    return logprobs_N - old_logprobs_N


def sequence_mean_log_ratios(logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Mean of the token log-ratios of the sequence, given to each of its tokens. [N]. GSPO, arXiv:2507.18071,
    eq. 7.
    """
    lengths_S = torch.bincount(sequence_N, minlength=sequences).clamp(min=1)
    sums_S = _sums(logprobs_N - old_logprobs_N, sequence_N, sequences)
    return (sums_S / lengths_S).index_select(0, sequence_N)


def sequence_sum_log_ratios(logprobs_N: Tensor, old_logprobs_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Sum of the token log-ratios of the sequence, for each of its tokens. [N]. RLOO, arXiv:2402.14740."""
    return _sums(logprobs_N - old_logprobs_N, sequence_N, sequences).index_select(0, sequence_N)


LOG_RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "token": token_log_ratios,
    "sequence": sequence_mean_log_ratios,
    "sequence_sum": sequence_sum_log_ratios,
}
"""`importance_sampling_level` -> log_ratios(logprobs_N, old_logprobs_N, sequence_N, sequences) -> [N]."""


def clipped(
    log_ratios_N: Tensor, advantages_N: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), rho = exp(log-ratio). Returns [N].

    Schulman et al., arXiv:1707.06347, eq. 7; an `epsilon_high` of its own is DAPO's clip-higher
    (arXiv:2503.14476). With old = new (on policy) the value is -A and the gradient -A grad log pi.
    """
    ratios_N = log_ratios_N.exp()
    bounded_N = ratios_N.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return -torch.minimum(ratios_N * advantages_N, bounded_N * advantages_N)


def clipped_tokens(
    log_ratios_N: Tensor, advantages_N: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Which tokens `clipped` gives no gradient: (low [N] bool, high [N] bool); for `clip_ratio/low_mean` and
    the like.
    """
    ratios_N = log_ratios_N.detach().exp()
    low_N = (ratios_N < 1 - epsilon) & (advantages_N < 0)
    high_N = (ratios_N > 1 + (epsilon if epsilon_high is None else epsilon_high)) & (advantages_N > 0)
    return low_N, high_N


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Estimate of KL(pi || pi_ref): e^d - d - 1, d = log pi_ref - log pi; never negative. Returns [N].

    Schulman 2020, "Approximating KL divergence", k3; arXiv:2402.03300, eq. 4. Unbiased in value for tokens
    sampled from pi; times rho = exp(log-ratio) its gradient is unbiased too (arXiv:2512.02556).
    """
    difference_N = reference_logprobs_N - logprobs_N
    return torch.expm1(difference_N) - difference_N


@dataclass(frozen=True)
class Aggregation:
    """How token losses become the loss of a step: sum(loss * weight) / items."""

    unit: Literal["token", "sequence"]
    token_weights: Callable[[Tensor, int], Tensor]
    """(lengths_S, max_completion_length) -> [S], the weight of every token of the sequence."""

    def count(self, lengths_S: Tensor) -> int:
        """Items in a batch. A sequence whose tokens are all masked (length 0) still is an item, as in TRL."""
        return lengths_S.numel() if self.unit == "sequence" else int(lengths_S.sum())

    def weights(
        self,
        lengths_S: Tensor,
        sequence_N: Tensor,
        max_completion_length: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """[N]: the weight of every token."""
        return self.token_weights(lengths_S.double(), max_completion_length).to(dtype).index_select(0, sequence_N)


def _one(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return torch.ones_like(lengths_S)


def _one_by_length(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return 1.0 / lengths_S.clamp(min=1)


def _one_by_longest(lengths_S: Tensor, max_completion_length: int) -> Tensor:
    return torch.full_like(lengths_S, 1.0 / max_completion_length)


AGGREGATIONS: dict[str, Aggregation] = {
    # mean over sequences of the mean over tokens, arXiv:2402.03300
    "grpo": Aggregation("sequence", _one_by_length),
    # mean over the tokens of the whole step, arXiv:2503.14476
    "dapo": Aggregation("token", _one),
    # TRL takes the mean over the tokens of a micro-batch; micro-batches must not change a result here, so it
    # is dapo
    "bnpo": Aggregation("token", _one),
    # a constant denominator, which does not favour long wrong answers, arXiv:2503.20783
    "dr_grpo": Aggregation("sequence", _one_by_longest),
}
"""`loss_type` -> Aggregation."""


def _sums(values_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    return values_N.new_zeros(sequences).index_add(0, sequence_N, values_N)
