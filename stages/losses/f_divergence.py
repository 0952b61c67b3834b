"""Scores of f-DPO: what stands in for the log-ratio when another divergence than the reverse KL holds the policy.

With u = pi / pi_ref and f the divergence's generator, the score is f'(u), a constant left out (Wang et al.,
arXiv:2309.16240, table 1). Log-ratios of any shape in, scores of that shape out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from stages.losses.pair_logprobs import bounded_expm1, log_sigmoid, reverse_kl

if TYPE_CHECKING:
    from torch import Tensor


def forward_kl(log_ratios: Tensor) -> Tensor:
    """f(u) = -log u: 1 - 1/u."""
    return -bounded_expm1(-log_ratios)


def js_divergence(log_ratios: Tensor) -> Tensor:
    """f(u) = u log u - (u + 1) log((u + 1) / 2): log(2u / (1 + u))."""
    return math.log(2) + log_sigmoid(log_ratios)


def alpha_divergence(log_ratios: Tensor, coefficient: float) -> Tensor:
    """f'(u) = (u^(a - 1) - 1) / (a - 1), in TRL's notation of the coefficient a; its limit at a = 1 is log u."""
    exponent = coefficient - 1.0
    if abs(exponent) < 1e-6:
        return log_ratios
    return bounded_expm1(exponent * log_ratios) / exponent


def f_divergence_of(name: str, coefficient: float) -> Callable[[Tensor], Tensor]:
    """`f_divergence_type` -> score."""
    return partial(alpha_divergence, coefficient=coefficient) if name == "alpha_divergence" else F_DIVERGENCES[name]


F_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
"""`f_divergence_type` -> score(log-ratios)."""
