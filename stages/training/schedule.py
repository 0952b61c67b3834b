"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.training.config import TrainingConfig

STABLE = "warmup_stable_decay"
"""The only one of which `decay_ratio` is."""


@dataclass(frozen=True)
class Schedule:
    """How the learning rate rises to its peak and falls from it, in factors of the peak."""

    fall: str
    """Of FALLS."""
    warmup_ratio: float = 0.0
    """Share of all steps over which the rate rises from zero, as many whole steps as that needs."""
    warmup_steps: int | None = None
    """So many steps in place of a share; never more than there are."""
    decay_ratio: float = 0.2
    """Share of all steps over which the rate falls where it stays at its peak before."""
    floor: float = 0.0
    """Where the fall would end after the last step."""

    @classmethod
    def of(cls, config: TrainingConfig) -> Schedule:
        """As the settings of a stage say."""
        return cls(
            fall=config.lr_scheduler_type,
            warmup_ratio=config.warmup_ratio,
            warmup_steps=config.warmup_steps,
            decay_ratio=config.lr_decay_ratio,
            floor=config.min_lr_ratio,
        )

    def warmup(self, total: int) -> int:
        """Steps that rise, of `total`."""
        return math.ceil(self.warmup_ratio * total) if self.warmup_steps is None else min(self.warmup_steps, total)

    def factor(self, step: int, total: int) -> float:
        """Of optimizer step `step` (from 0) of `total`."""
        warmup = self.warmup(total)
        if step < warmup:
            return step / warmup
        high = FALLS[self.fall](Place(step - warmup, total - warmup, math.ceil(self.decay_ratio * total)))
        return self.floor + (1.0 - self.floor) * high


@dataclass(frozen=True)
class Place:
    """A step after warm-up among those that follow it, and how many of them, the last ones, are for decay."""

    step: int
    steps: int
    decay: int

    @property
    def done(self) -> float:
        """Share of the steps, from 0 to below 1."""
        return self.step / max(1, self.steps)


def _stable(place: Place) -> float:
    """At the peak, then along a line (Hu et al., arXiv:2404.06395)."""
    decay = min(place.decay, place.steps)
    return min(1.0, (place.steps - place.step) / max(1, decay))


FALLS: Mapping[str, Callable[[Place], float]] = {
    "linear": lambda place: 1.0 - place.done,
    "cosine": lambda place: 0.5 * (1.0 + math.cos(math.pi * place.done)),
    "constant": lambda place: 1.0,
    STABLE: _stable,
}
"""Name -> factor of the peak, from 1 towards 0."""
