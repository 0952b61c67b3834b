"""Estimates of KL(pi || pi_ref) from the tokens of a completion, one value a token.

Schulman 2020, "Approximating KL divergence". As penalties of a loss they differ in what matters, their gradients:
k2's is that of the KL divergence for tokens sampled from pi, k3's is its first-order neighbour, and k1's is zero on
average, unless each is multiplied by the ratio of new to old probability (`use_bias_correction_kl`), which also counts
how the tokens came to be sampled: then k1's and k3's are exact (arXiv:2512.02556, eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stages.losses.policy_tokens import MOST_LOG_RATIO, with_slopes

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """log pi - log pi_ref; of either sign. Returns [N]."""
    return logprobs_N - reference_logprobs_N


def k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2. Returns [N]."""
    return (logprobs_N - reference_logprobs_N).square() / 2


def k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """e^d - d - 1, d = log pi_ref - log pi; never negative. Returns [N]. arXiv:2402.03300, eq. 4. The power is at most
    e^80, with a slope, as those of `policy_tokens.ratios`."""
    difference_N = reference_logprobs_N - logprobs_N
    bounded_N = difference_N.clamp(max=MOST_LOG_RATIO)
    powers_N = bounded_N.detach().expm1()
    return with_slopes(powers_N, powers_N + 1, difference_N) - bounded_N


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""`kl_estimator` -> estimate(log pi [N], log pi_ref [N]) -> [N]."""
