"""Settings of advantages: what of a completion's rewards its tokens learn from. Imports no torch."""

from __future__ import annotations

from typing import Literal

from stages.training.rollout_settings import JudgedConfig


class AdvantageConfig(JudgedConfig):
    """How rewards become advantages."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards are added up first, or each is normalized in its group first and their sum over the generation
    (GDPO, arXiv:2601.05242), so that none drowns another."""
    reward_clip_range: tuple[float, float] | None = None
    """Weighted sums of rewards are clipped to this range; null: not."""
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus_baseline"] = "grpo"
    """Baseline: the group's mean (grpo), or the mean of the others (rloo); reinforce_plus_plus_baseline divides what is
    above the group's mean by its deviation over the generation."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Which standard deviation advantages are divided by; grpo only."""
    normalize_advantages: bool = False
    """Subtract the generation's mean from the advantages and divide by their deviation; rloo only."""


def advantage_problems(config: AdvantageConfig, *, kl_in_reward: bool) -> list[str]:
    """What is wrong with the fields together."""
    problems = []
    estimator = config.advantage_estimator
    if estimator != "grpo" and config.scale_rewards != "group":
        problems.append(f"scale_rewards is of advantage_estimator grpo; {estimator} has none")
    if estimator != "rloo" and config.normalize_advantages:
        problems.append(f"normalize_advantages is of advantage_estimator rloo; {estimator} has none")
    if config.reward_clip_range is not None and not config.reward_clip_range[0] < config.reward_clip_range[1]:
        low, high = config.reward_clip_range
        problems.append(f"reward_clip_range [{low}, {high}] is no range; give the lower number first")
    if config.multi_objective_aggregation == "normalize_then_sum":
        unused = {
            "advantage_estimator": estimator != "grpo",
            "scale_rewards": config.scale_rewards != "group",
            "reward_clip_range": config.reward_clip_range is not None,
            "kl_placement: reward": kl_in_reward,
        }
        problems += [
            f"multi_objective_aggregation normalize_then_sum normalizes each reward by itself, so {name} does not go "
            "with it"
            for name, given in unused.items()
            if given
        ]
    return problems
