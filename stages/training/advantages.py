"""Advantages of a generation's completions, from their rewards and, where it counts there, the divergence from the
reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.losses.advantages import ADVANTAGES, normalize_then_sum
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.training.advantage_settings import AdvantageConfig
from stages.training.batch import Group
from stages.training.rollout_records import Sampled

Advantages = Callable[[Sequence[Sampled]], list[list[float]]]
"""Prompts with their scored completions -> an advantage a completion."""
Measure = Callable[[list[Group]], list[Group]]


def advantages_of(config: AdvantageConfig) -> Advantages:
    """As a stage's configuration says."""
    if config.multi_objective_aggregation == "normalize_then_sum":
        return partial(_of_each_reward, config.reward_weights)
    estimate = _estimator(config)
    return lambda sampled: _lists(estimate(_totals(config, sampled)))


def penalized(config: AdvantageConfig, penalty: RewardPenalty, measure: Measure) -> tuple[Advantages, Measure]:
    """(rewards in the place of advantages, `measure` and then the advantages of rewards less the penalty).

    The log-probabilities that the penalty compares are known only when the groups are measured.
    """
    estimate = _estimator(config)

    def measured(groups: list[Group]) -> list[Group]:
        groups = measure(groups)
        rewards_PG = torch.tensor([group.data.advantages for group in groups], dtype=torch.float64)
        advantages = _lists(estimate(rewards_PG - torch.stack([penalty(group) for group in groups])))
        return [
            replace(group, data=replace(group.data, advantages=tuple(values)))
            for group, values in zip(groups, advantages, strict=True)
        ]

    return lambda sampled: _lists(_totals(config, sampled)), measured


@dataclass(frozen=True)
class RewardPenalty:
    """beta times the summed divergence of a completion's tokens from the reference, by the log-probabilities at
    sampling time (RLOO, arXiv:2402.14740)."""

    beta: float
    estimate: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, beta: float, kl_estimator: str | None) -> RewardPenalty:
        """With the estimator of that name; None: k1."""
        return cls(beta, KL_ESTIMATORS[kl_estimator or "k1"])

    def __call__(self, group: Group) -> Tensor:
        """[G] float64, of every completion of a measured group."""
        old, reference = group.data.old_logprobs, group.data.reference_logprobs
        assert old is not None and reference is not None
        pairs = zip(old, reference, strict=True)
        divergences = [self.estimate(*(torch.tensor(one, dtype=torch.float64) for one in pair)) for pair in pairs]
        return self.beta * torch.stack([one.sum() for one in divergences])


def _estimator(config: AdvantageConfig) -> Callable[[Tensor], Tensor]:
    settings: dict[str, dict[str, Any]] = {
        "grpo": {"scale_rewards": config.scale_rewards},
        "rloo": {"normalize_advantages": config.normalize_advantages},
    }
    return partial(ADVANTAGES[config.advantage_estimator], **settings.get(config.advantage_estimator, {}))


def _totals(config: AdvantageConfig, sampled: Sequence[Sampled]) -> Tensor:
    """[P, G] weighted sums of rewards."""
    totals_PG = torch.stack([_numbers(entry.totals) for entry in sampled])
    return totals_PG if config.reward_clip_range is None else totals_PG.clamp(*config.reward_clip_range)


def _of_each_reward(weights: Sequence[float] | None, sampled: Sequence[Sampled]) -> list[list[float]]:
    rewards_PGK = torch.stack(
        [torch.stack([_numbers(values) for values in entry.rewards.values()], dim=1) for entry in sampled]
    )
    count = rewards_PGK.shape[2]
    return _lists(normalize_then_sum(rewards_PGK, torch.tensor(weights or [1.0] * count, dtype=torch.float64)))


def _numbers(values: Sequence[float | None]) -> Tensor:
    """[G] float64, NaN for None."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)


def _lists(values_PG: Tensor) -> list[list[float]]:
    values: list[list[float]] = values_PG.tolist()
    return values
