"""Turns, calls and answers of a generation, as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from stages.rollouts.requests import Completion


def own_length(completion: Completion) -> int:
    """Tokens that the model wrote."""
    mask = completion.loss_mask
    return len(completion.token_ids) if mask is None else sum(mask)


def turn_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Of completions with episodes; tools/ under TRL's names. None of others."""
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    if not episodes:
        return {}
    calls = sum(episode.tool_calls for episode in episodes)
    failures = sum(episode.tool_failures for episode in episodes)
    answered = [len(completion.token_ids) - own_length(completion) for completion in completions]
    metrics = {
        "turns/mean": fmean(episode.turns for episode in episodes),
        "turns/max": float(max(episode.turns for episode in episodes)),
        "turns/limit_ratio": fmean(float(episode.ending == "turn limit") for episode in episodes),
        "turns/mean_answered_length": fmean(answered),
        "tools/call_frequency": calls / len(episodes),
        "tools/failure_frequency": failures / calls if calls else 0.0,
    }
    if any(episode.environment_rewards or episode.error for episode in episodes):
        metrics["environment/failure_frequency"] = fmean(float(episode.error is not None) for episode in episodes)
        metrics["environment/done_ratio"] = fmean(float(episode.ending == "done") for episode in episodes)
    return metrics
