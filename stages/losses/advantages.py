"""Advantages from rewards: P prompts, G completions of each, K reward functions.

`rewards_PG` holds NaN where no reward function scored a completion; such a completion is in no mean and no
standard deviation, and gets advantage 0. Pass the rewards of the whole generation, of all ranks: batch
statistics depend on all of them. Nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


def grpo(rewards_PG: Tensor, *, scale_rewards: Literal["group", "batch", "none"] = "group") -> Tensor:
    """Group-relative advantage (r - mean of the group) / (s + 1e-4). Returns [P, G].

    Shao et al., arXiv:2402.03300, sec. 4.1. s is the standard deviation (Bessel-corrected) of the group, of
    the whole batch (Lite PPO, arXiv:2508.08221), or absent (Dr. GRPO, arXiv:2503.20783).
    """
    return _scored_only(SCALES[scale_rewards](_centered(rewards_PG), rewards_PG), rewards_PG)


def _by_group(centered_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return centered_PG / (_std(rewards_PG, dim=1) + EPSILON)


def _by_batch(centered_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return centered_PG / (_std(rewards_PG.reshape(1, -1), dim=1) + EPSILON)


def _unscaled(centered_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return centered_PG


SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"group": _by_group, "batch": _by_batch, "none": _unscaled}
"""`scale_rewards` -> scaled(rewards less their group's mean, rewards) -> [P, G]."""


def rloo(rewards_PG: Tensor, *, normalize_advantages: bool = False) -> Tensor:
    """Leave-one-out advantage r_i - mean of the other scored rewards of the group. Returns [P, G].

    Kool et al. 2019; Ahmadian et al., arXiv:2402.14740, eq. 8. A completion that is the only scored one of
    its group has no baseline and gets 0. `normalize_advantages`: (A - mean of the batch) / (standard
    deviation + 1e-4).
    """
    scored_PG = ~torch.isnan(rewards_PG)
    others_PG = scored_PG.sum(1, keepdim=True) - scored_PG.long()
    sum_PG = torch.nan_to_num(rewards_PG, nan=0.0).sum(1, keepdim=True) - rewards_PG
    advantages_PG = _exactly_zero_where_constant(rewards_PG - sum_PG / others_PG.clamp(min=1), rewards_PG)
    advantages_PG = torch.where(others_PG > 0, advantages_PG, torch.zeros_like(advantages_PG))
    if normalize_advantages:
        flat_1N = torch.where(scored_PG, advantages_PG, torch.nan).reshape(1, -1)
        advantages_PG = (advantages_PG - _mean(flat_1N, dim=1)) / (_std(flat_1N, dim=1) + EPSILON)
    return _scored_only(advantages_PG, rewards_PG)


def reinforce_plus_plus_baseline(rewards_PG: Tensor) -> Tensor:
    """(r - mean of the group), divided by the standard deviation of these over the batch + 1e-4. Returns [P, G].

    Hu et al., arXiv:2501.03262, sec. 3.2. The batch's mean, which the paper takes off too, is 0: every group's is.
    Unlike grpo scaled by the batch, groups of different difficulty do not make the deviation larger.
    """
    centered_PG = _centered(rewards_PG)
    return _scored_only(centered_PG / (_std(centered_PG.reshape(1, -1), dim=1) + EPSILON), rewards_PG)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
"""`advantage_estimator` -> advantages(rewards_PG, *, ...) -> [P, G]."""


def weighted_sum(rewards_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """[P, G] sum of weighted rewards over those that scored the completion; NaN where none did."""
    totals_PG = torch.nansum(rewards_PGK * weights_K, dim=2)
    return totals_PG.masked_fill(torch.isnan(rewards_PGK).all(2), torch.nan)


def normalize_then_sum(rewards_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """Each reward is normalized in its group, the weighted sum over the batch: no reward drowns another. [P, G].

    GDPO, arXiv:2601.05242: r_k -> (r_k - mean of the group) / (s_k + 1e-4), A = sum of w_k r_k / (s + 1e-4) with s
    that of the sums over the batch. Their mean, which the paper takes off too, is 0: every group's is.
    """
    by_reward_KPG = rewards_PGK.permute(2, 0, 1)
    normal_PGK = torch.stack([_by_group(_centered(one_PG), one_PG) for one_PG in by_reward_KPG], dim=2)
    sums_PG = weighted_sum(normal_PGK, weights_K)
    return torch.nan_to_num(sums_PG / (_std(sums_PG.reshape(1, -1), dim=1) + EPSILON), nan=0.0)


def generalized_advantages(
    rewards_ST: Tensor, values_ST: Tensor, lengths_S: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages [S, T], returns [S, T]) of S sequences whose tokens are rewarded, zeros beyond their lengths.

    GAE, Schulman et al., arXiv:1506.02438, eq. 16: A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t,
    with V = 0 after the last token; returns are A + V.
    """
    inside_ST = torch.arange(rewards_ST.shape[1], device=rewards_ST.device) < lengths_S[:, None]
    rewards_ST, values_ST = rewards_ST * inside_ST, values_ST * inside_ST
    advantages_ST = torch.zeros_like(rewards_ST)
    next_advantage_S = next_value_S = torch.zeros_like(rewards_ST[:, 0])
    for t in reversed(range(rewards_ST.shape[1])):
        change_S = rewards_ST[:, t] + gamma * next_value_S - values_ST[:, t]
        next_advantage_S = (change_S + gamma * lam * next_advantage_S) * inside_ST[:, t]
        next_value_S = values_ST[:, t]
        advantages_ST[:, t] = next_advantage_S
    return advantages_ST, advantages_ST + values_ST


def whitened(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8), variance Bessel-corrected, as in TRL's PPO; `shift_mean` false: the mean
    is put back.
    """
    mean = values.mean()
    white = (values - mean) * torch.rsqrt(values.var() + 1e-8)
    return white if shift_mean else white + mean


def _centered(rewards_PG: Tensor) -> Tensor:
    """Rewards less their group's mean; NaN where not scored."""
    return _exactly_zero_where_constant(rewards_PG - _mean(rewards_PG, dim=1), rewards_PG)


def _scored_only(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return torch.where(torch.isnan(rewards_PG), torch.zeros_like(advantages_PG), advantages_PG)


def _exactly_zero_where_constant(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """Rounding leaves 1e-9 in a group of equal rewards; exact zeros let the trainer skip such a group."""
    missing_PG = torch.isnan(rewards_PG)
    highest_P1 = rewards_PG.masked_fill(missing_PG, -torch.inf).amax(1, keepdim=True)
    lowest_P1 = rewards_PG.masked_fill(missing_PG, torch.inf).amin(1, keepdim=True)
    return torch.where((highest_P1 == lowest_P1) & ~missing_PG, torch.zeros_like(advantages_PG), advantages_PG)


def _mean(values: Tensor, dim: int) -> Tensor:
    """Mean of the values that are not NaN; NaN if there is none. Keeps the dimension."""
    return torch.nanmean(values, dim=dim, keepdim=True)


def _std(values: Tensor, dim: int) -> Tensor:
    """Bessel-corrected standard deviation of the values that are not NaN; 0 for fewer than two. Keeps the
    dimension.
    """
    squares = torch.nansum((values - _mean(values, dim)).square(), dim=dim, keepdim=True)
    freedom = (~torch.isnan(values)).sum(dim, keepdim=True) - 1
    return torch.sqrt(squares / freedom.clamp(min=1))
