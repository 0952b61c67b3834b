"""Rewards and lengths of what was sampled, as metrics of the steps that train on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from stages.rollouts.multi_turn.metrics import own_length, turn_metrics
from stages.rollouts.rewards import failed_metric
from stages.training.lesson import lesson_metrics
from stages.training.rollout_records import Sampled

STALENESS_MEAN, STALENESS_MAX = "sample/staleness_mean", "sample/staleness_max"
"""Optimizer steps between the weights that made a step's tokens and those that learn from them."""


OF_GROUPS = ("reward_std", "frac_reward_zero_std", "completions/duplicate_ratio")
"""Metrics that compare the completions of a prompt; they say nothing where there is one."""
STALE_TOKENS = "sample/stale_tokens"
"""Share of them that older weights made than those that learn from them; where weights change amid completions."""
VERSIONS_MEAN, VERSIONS_MAX = "sample/weight_versions_mean", "sample/weight_versions_max"
"""Weights that made tokens of one completion; where they change amid completions."""


def staleness_metrics(sampled: Sequence[Sampled], step: int) -> dict[str, float]:
    """Of a generation before the optimizer step with this index, its first one."""
    ages = [step - version for versions in _versions(sampled) for version in versions]
    return {STALENESS_MEAN: fmean(ages), STALENESS_MAX: float(max(ages))} if ages else {}


def mixture_metrics(sampled: Sequence[Sampled], step: int) -> dict[str, float]:
    """The same, and how many weights made it together."""
    counts = [len(set(versions)) for versions in _versions(sampled) if versions]
    if not counts:
        return {}
    stale = fmean(version < step for versions in _versions(sampled) for version in versions)
    mixed = {STALE_TOKENS: stale, VERSIONS_MEAN: fmean(counts), VERSIONS_MAX: float(max(counts))}
    return staleness_metrics(sampled, step) | mixed


def _versions(sampled: Sequence[Sampled]) -> list[list[int]]:
    """By completion, those of its tokens."""
    return [completion.weight_versions for one in sampled for completion in one.completions]


def aged(metrics: Mapping[str, float], steps: int) -> dict[str, float]:
    """The metrics of a generation so many optimizer steps after the first one that uses it."""
    older = {name: metrics[name] + steps for name in (STALENESS_MEAN, STALENESS_MAX) if name in metrics}
    if steps and STALE_TOKENS in metrics:
        older[STALE_TOKENS] = 1.0
    return {**metrics, **older}


def rollout_metrics(sampled: Sequence[Sampled]) -> dict[str, float]:
    """Rewards and lengths of a generation, under TRL's names. Lengths are of what the model wrote."""
    completions = [completion for entry in sampled for completion in entry.completions]
    lengths = [own_length(completion) for completion in completions]
    ended = [own_length(completion) for completion in completions if completion.finished]
    groups = [[value for value in entry.totals if value is not None] for entry in sampled]
    totals = [value for group in groups for value in group]
    metrics = {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/duplicate_ratio": fmean(_repeated(entry) for entry in sampled),
        **turn_metrics(completions),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = fmean(ended)
    if totals:
        metrics["reward"] = fmean(totals)
        metrics["reward_std"] = fmean(_deviation(group) for group in groups if group)
        metrics["frac_reward_zero_std"] = fmean(float(len(set(group)) <= 1) for group in groups)
    for name in sampled[0].rewards:
        values = [value for entry in sampled for value in entry.rewards[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = fmean(values)
            metrics[f"rewards/{name}/std"] = _deviation(values)
    for name in sampled[0].failed:
        metrics[failed_metric(name)] = float(sum(entry.failed.get(name, 0) for entry in sampled))
    return metrics | lesson_metrics([entry.lessons for entry in sampled])


def _repeated(sampled: Sampled) -> float:
    """Share of a prompt's completions after the first that repeat another one, token by token."""
    different = len({tuple(completion.token_ids) for completion in sampled.completions})
    return (len(sampled.completions) - different) / max(1, len(sampled.completions) - 1)


def _deviation(values: Sequence[float]) -> float:
    """Bessel-corrected; 0 for a single value."""
    return float(pstdev(values) * (len(values) / max(1, len(values) - 1)) ** 0.5)
