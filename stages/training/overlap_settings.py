"""What rollouts of older weights may be asked for, checked before a run begins. Imports no torch."""

from __future__ import annotations

from typing import Any


def overlap_problems(config: Any) -> list[str]:
    """Of a stage that can train on them, and of its policy's loss."""
    if not config.rollouts.max_staleness:
        return []
    problems = []
    if config.importance_sampling_mode is None:
        problems.append(
            "importance_sampling_mode is null, but rollouts.max_staleness has completions sampled by older weights, "
            "which nothing else corrects for; leave it out (token_truncate), or give another one"
        )
    if config.rollouts.weight_transfer == "nccl":
        problems.append(
            "rollouts.weight_transfer nccl sends weights that are still the trainer's; with rollouts.max_staleness use "
            "folder"
        )
    if config.penalizes_reward:
        problems.append(
            "kl_placement reward with rollouts.max_staleness: the penalty would be of other weights than those that "
            "sampled; use kl_placement loss"
        )
    return problems
