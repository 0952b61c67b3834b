"""Trouble of training on pairs and judged completions: margins, accuracies, the likelihood of what was chosen."""

from __future__ import annotations

from stages.monitors.history import FEW, History


def margin_collapse(run: History) -> str | None:
    """The implicit reward margin was there and has gone."""
    if len(run.values("rewards/margins")) < 3 * FEW:
        return None
    best, last = run.best("rewards/margins"), run.last("rewards/margins")
    if best <= 0 or last > 0.2 * best:
        return None
    return (
        f"reward margin {last:.3g}, {best:.3g} at its best; chosen and rejected are no longer told apart: lower "
        "learning_rate, raise beta, or look whether the order of the rows changes their kind"
    )


def chosen_falling(run: History) -> str | None:
    """Chosen completions have become much less likely, although they win."""
    if min(len(run.values("logps/chosen")), len(run.values("rewards/margins"))) < 2 * FEW:
        return None
    first, last = run.first("logps/chosen"), run.last("logps/chosen")
    # log-probabilities are below 0
    if last >= 1.5 * first or run.last("rewards/margins") <= run.first("rewards/margins"):
        return None
    return (
        f"log-probability of chosen completions {last:.4g}, {first:.4g} at the start, while margins grow: both "
        "completions are unlearnt; add the likelihood of the chosen one (loss_type: [sigmoid, sft]), or take apo_zero"
    )


def accuracy_at_chance(run: History) -> str | None:
    """Chosen completions win as often as a coin."""
    for name in ("rewards/accuracies", "accuracy"):
        steps = len(run.values(name))
        if steps >= 5 * FEW and abs(run.last(name, 2 * FEW) - 0.5) <= 0.03:
            return (
                f"{name} {run.last(name, 2 * FEW):.3f} over the last {2 * FEW} of {steps} steps: nothing is learnt; "
                "raise learning_rate, or look whether chosen and rejected are mixed up"
            )
    return None
