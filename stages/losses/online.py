"""Losses of on-line algorithms beyond policy gradients with ratios: XPO, Nash-MD and A*-PO.

B prompts, N tokens of completions, all sampled with the present weights unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def explored(logprobs_B2: Tensor, weights_B2: Tensor) -> Tensor:
    """XPO's bonus for exploration: alpha log pi(y~), y~ a completion of the reference. Returns [B].

    Xie et al., arXiv:2405.21046, algorithm 1: the policy is rewarded for leaving what the reference would say, which is
    optimism in the face of uncertainty; added to the loss of DPO. `weights_B2`: alpha where a completion of the pair is
    the reference's, else 0.
    """
    return (weights_B2 * logprobs_B2).sum(1)


def nash_md(logprobs_N: Tensor, reference_logprobs_N: Tensor, advantages_N: Tensor, *, beta: float) -> Tensor:
    """(beta sg(log pi - log pi_ref) - (P - 1/2)) log pi, token by token; its sum is a completion's loss. Returns [N].

    Munos et al., arXiv:2312.00886, Nash-MD-PG: REINFORCE of the preference P over a completion of the mixture of policy
    and reference, with baseline 1/2, and of the KL divergence to the reference. `advantages_N`: P - 1/2 of the
    completion. Only the slope means something; the value is TRL's.
    """
    return (beta * (logprobs_N.detach() - reference_logprobs_N) - advantages_N) * logprobs_N


def bradley_terry(gap: float) -> float:
    """sigmoid(reward - other reward): rewards as the logits of Bradley and Terry's model."""
    return 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))


def higher(gap: float) -> float:
    """1 where the reward is higher, 0 where it is lower, 1/2 where both are equal."""
    return 0.5 * (1 + (gap > 0) - (gap < 0))


PREFERENCES: dict[str, Callable[[float], float]] = {"bradley_terry": bradley_terry, "higher": higher}
"""`preference` -> probability that a completion is preferred, from how much more its reward is than the other's."""


def optimal_value(rewards: Sequence[float], *, beta1: float) -> float:
    """V*(x) = beta1 log mean exp(r / beta1) over completions of the reference.

    Brantley et al., arXiv:2505.20686: what the best policy under a KL penalty of beta1 is worth, without that policy.
    """
    most = max(rewards)
    return most + beta1 * math.log(sum(math.exp((reward - most) / beta1) for reward in rewards) / len(rewards))


def advantage_regression(log_ratios_B: Tensor, advantages_B: Tensor, *, beta2: float) -> Tensor:
    """(beta2 log(pi / pi_ref) - (r - V*))^2 of a completion. Returns [B]. A*-PO, arXiv:2505.20686.

    `log_ratios_B`: sums over the tokens of the completion; `advantages_B`: r - V*, the optimal policy's advantage.
    """
    return (beta2 * log_ratios_B - advantages_B).square()
