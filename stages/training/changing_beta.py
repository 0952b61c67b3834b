"""Stages whose beta changes from one pass over the prompts to the next, as TRL's on-line trainers take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stages.training.objective import Window, Windows, WindowsAround
from stages.training.opponents import ByEpoch


def beta_of_step(windows: Windows, config: Any, prompts: int, use: Callable[[float], None]) -> Windows:
    """The windows of a stage with one item a prompt, as its configuration says: with a beta that is told to `use` once,
    or for every step."""
    if not isinstance(config.beta, tuple):
        use(config.beta)
        return windows
    return ChangingBeta(windows, ByEpoch(config.beta, config.train_batch_size, prompts), use)


def first_beta(beta: float | tuple[float, ...]) -> float:
    """The one of the first pass."""
    return beta[0] if isinstance(beta, tuple) else beta


class ChangingBeta(WindowsAround):
    """Windows that tell the objective the beta of their step, and log it."""

    def __init__(self, windows: Windows, betas: ByEpoch, use: Callable[[float], None]) -> None:
        super().__init__(windows)
        self.betas, self.use = betas, use

    def window(self, step: int) -> Window:
        """That of the windows inside."""
        beta = self.betas.at(step)
        self.use(beta)
        window = self.windows.window(step)
        return replace(window, metrics={**window.metrics, "beta": beta})
