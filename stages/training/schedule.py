"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""Name -> factor of the peak rate, given which share of the steps after warm-up is done (0 to 1)."""


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (from 0). Warm-up rises linearly from 0 over ceil(warmup_ratio x total)."""
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * SCHEDULES[schedule](done)
