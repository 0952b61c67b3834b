"""What a run on recorded rollouts may be asked for, checked before it begins."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

SAMPLING = ("dynamic_sampling_rounds", "replay_buffer_size", "curriculum", "structured")
"""Settings that choose what is sampled."""


def replay_problems(config: Any, wired: Set[str]) -> list[str]:
    """What is wrong with the inputs of a stage that takes prompts to sample, or `rollouts` as they were recorded."""
    if "rollouts" not in wired:
        return [] if "dataset" in wired else ["input dataset is missing: the prompts to sample; or wire in rollouts"]
    problems = [
        f"input rollouts brings its own prompts and rewards: leave out input {name}"
        for name in ("dataset", "reward_model")
        if name in wired
    ]
    if config.rewards:
        problems.append("input rollouts brings its own rewards: leave out rewards, or score them by a stage rescore")
    chosen = [name for name in SAMPLING if getattr(config, name)]
    chosen += [f"rollouts.engine {config.rollouts.engine}"] if config.rollouts.is_apart else []
    return problems + [f"{name} is of sampling; input rollouts is taken as it was recorded" for name in chosen]
