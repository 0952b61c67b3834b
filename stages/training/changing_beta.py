"""Stages whose beta changes from one pass over the prompts to the next, as TRL's on-line trainers take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from stages.training.objective import Window, Windows
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


class ChangingBeta:
    """Windows that tell the objective the beta of their step, and log it."""

    def __init__(self, windows: Windows, betas: ByEpoch, use: Callable[[float], None]) -> None:
        self.windows, self.betas, self.use = windows, betas, use
        self.total_steps = windows.total_steps

    def window(self, step: int) -> Window:
        """That of the windows."""
        beta = self.betas.at(step)
        self.use(beta)
        window = self.windows.window(step)
        return replace(window, metrics={**window.metrics, "beta": beta})

    def state(self) -> dict[str, Any]:
        """Theirs: beta follows from the step."""
        return self.windows.state()

    def tensors(self) -> dict[str, Tensor]:
        """Theirs."""
        return self.windows.tensors()

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Into them."""
        self.windows.load(state, tensors)
