"""Advantages from rewards: P prompts, G completions of each.

`rewards_PG` holds NaN where no reward function scored a completion; such a completion is in no mean and no
standard deviation, and gets advantage 0. Pass the rewards of the whole optimizer step, of all ranks: batch
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
    centered_PG = _exactly_zero_where_constant(rewards_PG - _mean(rewards_PG, dim=1), rewards_PG)
    if scale_rewards == "group":
        centered_PG = centered_PG / (_std(rewards_PG, dim=1) + EPSILON)
    elif scale_rewards == "batch":
        centered_PG = centered_PG / (_std(rewards_PG.reshape(1, -1), dim=1) + EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', found {scale_rewards!r}")
    return torch.where(torch.isnan(rewards_PG), torch.zeros_like(rewards_PG), centered_PG)


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
    return torch.where(scored_PG, advantages_PG, torch.zeros_like(advantages_PG))


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"grpo": grpo, "rloo": rloo}
"""Name -> advantages(rewards_PG, *, ...) -> [P, G]."""


def _exactly_zero_where_constant(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """Rounding leaves 1e-9 in a group of equal rewards; exact zeros let the trainer skip such a group."""
    missing_PG = torch.isnan(rewards_PG)
    highest_P1 = rewards_PG.masked_fill(missing_PG, -torch.inf).amax(1, keepdim=True)
    lowest_P1 = rewards_PG.masked_fill(missing_PG, torch.inf).amin(1, keepdim=True)
    return torch.where(highest_P1 == lowest_P1, torch.zeros_like(advantages_PG), advantages_PG)


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
