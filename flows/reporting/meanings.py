"""What the most common metrics of training count, in a few words beside their curves."""

from __future__ import annotations

MEANINGS = {
    "accuracy": "share of pairs or steps told apart rightly",
    "completions/mean_length": "tokens a completion",
    "divergence": "from the teacher, nats a token",
    "entropy": "nats a token",
    "grad_norm": "length of the gradient, before it is clipped",
    "kl": "from the reference, nats",
    "learning_rate": "of each step",
    "mean_token_accuracy": "share of tokens that the model would have chosen",
    "reward": "mean of a step's completions",
    "rewards/accuracies": "share of pairs in which chosen is ahead",
    "rewards/margins": "reward of chosen less that of rejected",
}
LOSSES = {
    "sft": "nats a token",
    "distill": "distance from the teacher",
    "preference": "mean of a step's pairs",
    "reward_model": "mean of a step's pairs",
    "rl": "moves around 0 by its nature: look at the reward",
}
"""Kind of stage -> what its loss is."""
HELD_OUT = "eval/"


def meaning(metric: str, uses: str) -> str:
    """Empty where there is nothing to say that the name does not."""
    name = metric.removeprefix(HELD_OUT)
    words = LOSSES.get(uses, "") if name == "loss" else MEANINGS.get(name, "")
    return ", ".join(filter(None, [words, "on held-out rows" if metric != name else ""]))
