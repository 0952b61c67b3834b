"""What rollouts of older weights may be asked for, checked before a run begins. Imports no torch."""

from __future__ import annotations

from typing import Any

_NOTHING_IN_FLIGHT = (
    "rollouts.in_flight_updates is true, but with rollouts.max_staleness 0 the trainer waits for all completions, and "
    "there are none whose weights could change; set max_staleness to 1 or more, or leave in_flight_updates out"
)


def overlap_problems(config: Any) -> list[str]:
    """Of a stage that can train on them, and of its policy's loss."""
    problems = sampling_problems(config) + correction_needed(config)
    if config.rollouts.max_staleness and config.penalizes_reward:
        problems.append(
            "kl_placement reward with rollouts.max_staleness: the penalty would be of other weights than those that "
            "sampled; use kl_placement loss"
        )
    return problems


def correction_needed(config: Any) -> list[str]:
    """By a policy gradient."""
    if not config.rollouts.max_staleness or config.importance_sampling_mode is not None:
        return []
    return [
        "importance_sampling_mode is null, but rollouts.max_staleness has completions sampled by older weights, which "
        "nothing else corrects for; give one (token_truncate, say)"
    ]


def sampling_problems(config: Any) -> list[str]:
    """Of how they are sampled, whatever the loss makes of them."""
    if not config.rollouts.max_staleness:
        return [_NOTHING_IN_FLIGHT] if config.rollouts.in_flight_updates else []
    problems = []
    if config.rollouts.in_flight_updates and config.rollouts.lora_sync == "adapter":
        problems.append(
            "rollouts.lora_sync adapter with rollouts.in_flight_updates: vLLM ends a completion with the adapter that "
            "it began with; use merged, or leave in_flight_updates out"
        )
    if config.rollouts.weight_transfer == "nccl" and not config.rollouts.in_flight_updates:
        problems.append(
            "rollouts.weight_transfer nccl sends weights that are still the trainer's; with rollouts.max_staleness use "
            "folder, or in_flight_updates, which send none that have waited"
        )
    return problems
