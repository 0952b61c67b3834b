"""Trouble that the curves of any training run can show."""

from __future__ import annotations

import math
from statistics import fmean, median

from stages.monitors.history import FEW, History

FAR = 10.0
"""KL divergence of completions, in nats, at which a policy is no longer near its reference."""
FAR_OF_TOKENS = 1.0
"""The same of a token."""


def loss_spike(run: History) -> str | None:
    """The newest loss is far above those before it."""
    losses = run.values("loss")
    before = losses[-FEW - 1 : -1]
    if len(before) < FEW:
        return None
    usual = median(before)
    spread = median(abs(loss - usual) for loss in before)
    if losses[-1] <= usual + 10 * spread + 0.5 * abs(usual):
        return None
    return (
        f"loss {losses[-1]:.4g} after {usual:.4g} (median of {FEW} steps); look at this step's rows in steps.jsonl; a "
        "lower learning_rate, a longer warmup_ratio or a smaller max_grad_norm keep single rows from this"
    )


def held_out_rising(run: History) -> str | None:
    """The loss of rows that are not trained on goes up, twice in a row and well above where it was."""
    losses = run.values("eval/loss")
    if "eval/loss" not in run.newest or len(losses) < 3:
        return None
    lowest = min(losses)
    if not (losses[-1] >= losses[-2] > lowest and losses[-1] > lowest + 0.05 * abs(lowest)):
        return None
    return (
        f"loss {losses[-1]:.4g} of eval_dataset, {lowest:.4g} at its lowest; rows are learnt by heart: keep: best "
        "takes the weights from there and early_stopping_patience ends the run; more rows, fewer steps or a lower "
        "learning_rate go further"
    )


def held_out_reward_falling(run: History) -> str | None:
    """What is earned on prompts that are not trained on falls, twice in a row and well below where it was, while
    training earns as much as ever: over-optimization."""
    apart = run.values("eval/reward")
    if "eval/reward" not in run.newest or len(apart) < 3 or len(run.values("reward")) < 2 * FEW:
        return None
    highest, size = max(apart), max(map(abs, apart))
    if not (apart[-1] <= apart[-2] < highest and apart[-1] < highest - 0.1 * size):
        return None
    first, last = run.first("reward"), run.last("reward")
    if last <= first or last < run.best("reward"):
        return None
    return (
        f"reward {apart[-1]:.4g} of eval_dataset, {highest:.4g} at its highest, while that of training went up from "
        f"{first:.4g} to {last:.4g}; what is learnt holds for the prompts that are trained on only: keep: best takes "
        "the weights from there and early_stopping_patience ends the run; more prompts, a larger beta or a lower "
        "learning_rate go further"
    )


def entropy_collapse(run: History) -> str | None:
    """The model has become almost certain of every token."""
    if len(run.values("entropy")) < 2 * FEW:
        return None
    first, last = run.first("entropy"), run.last("entropy")
    if first <= 0 or last >= 0.1 * first:
        return None
    return (
        f"entropy {last:.3g} nats a token, {first:.3g} at the start; the model writes one answer only: stop earlier, "
        "or lower learning_rate; in preference and RL stages raise beta"
    )


def kl_runaway(run: History) -> str | None:
    """The policy is far from its reference, and getting farther."""
    divergences = run.values("kl")
    if len(divergences) < 2 * FEW:
        return None
    before, last = fmean(divergences[-2 * FEW : -FEW]), run.last("kl")
    on_line = bool(run.values("completions/mean_length"))  # there it is of tokens, elsewhere of whole completions
    if last < (FAR_OF_TOKENS if on_line else FAR) or last < 1.5 * before:
        return None
    return (
        f"KL divergence from the reference {last:.3g}{' a token' if on_line else ''}, {before:.3g} {FEW} steps before: "
        "raise beta, lower learning_rate"
    )


def not_finite(run: History) -> str | None:
    """A metric of the newest step is no number."""
    bad = [f"{name} is {value}" for name, value in run.newest.items() if not math.isfinite(value)]
    if not bad:
        return None
    return (
        f"{', '.join(bad)}; the steps after it are worth nothing: look at this step's rows in steps.jsonl, lower "
        "learning_rate or max_grad_norm, and start again from a checkpoint before it"
    )
