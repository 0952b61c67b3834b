"""Losses of a value function, and the rewards of single tokens that it is to foresee: PPO's other half.

N completion tokens. A loss gives [N]; the objective returns its sum, and the loop divides once by the tokens of the
whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, cliprange_value: float = 0.2) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2, V_clip = V_old + clip(V - V_old, -c, c). Returns [N].

    PPO's reference implementation (Dhariwal et al. 2017; arXiv:2005.12729, sec. 3), as in TRL. The larger of the two:
    where V has left the range towards R it learns no more, where it has left it away from R it learns on.
    """
    bounded_N = old_values_N + (values_N - old_values_N).clamp(-cliprange_value, cliprange_value)
    return torch.maximum((values_N - returns_N).square(), (bounded_N - returns_N).square()) / 2


def clipped_values(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, cliprange_value: float = 0.2
) -> Tensor:
    """[N] bool: where `clipped_value` takes the clipped value, and gives no gradient."""
    bounded_N = old_values_N + (values_N - old_values_N).clamp(-cliprange_value, cliprange_value)
    return (bounded_N - returns_N).square() > (values_N - returns_N).square()


def token_rewards(kl_ST: Tensor, scores_S: Tensor, lengths_S: Tensor, *, kl_coef: float) -> Tensor:
    """[S, T]: -kl_coef times the KL term of every token, and at the last token of a sequence its score too.

    Ziegler et al., arXiv:1909.08593, eq. 2. Zeros beyond the lengths; a sequence without tokens has no reward.
    """
    places_T = torch.arange(kl_ST.shape[1], device=kl_ST.device)
    inside_ST = places_T < lengths_S[:, None]
    last_ST = places_T == lengths_S[:, None] - 1
    return torch.where(inside_ST, -kl_coef * kl_ST, 0.0) + torch.where(last_ST, scores_S[:, None], 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, sequences: int) -> float:
    """The coefficient after so many sequences of this KL divergence: larger where it is above the target.

    Ziegler et al., arXiv:1909.08593, sec. 2.2: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) sequences / horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * sequences / horizon)
