"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.training.config import TrainingConfig

STABLE = "warmup_stable_decay"
RESTARTS, POLYNOMIAL, INVERSE_SQRT = "cosine_with_restarts", "polynomial", "inverse_sqrt"
SETTINGS = {
    "lr_decay_ratio": STABLE,
    "lr_decay_type": STABLE,
    "lr_num_cycles": RESTARTS,
    "lr_power": POLYNOMIAL,
    "lr_timescale": INVERSE_SQRT,
}
"""Setting -> the only `lr_scheduler_type` that uses it."""
ENDLESS = ("constant", INVERSE_SQRT)
"""Those whose fall has no end that could be set."""
_TIMESCALE = 10_000
"""Of `inverse_sqrt` without warm-up, as in transformers."""


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
    decay: str = "linear"
    """Of DECAYS: how it falls over those steps."""
    cycles: int = 1
    """Falls, each from the peak, where there may be several."""
    power: float = 1.0
    timescale: int | None = None
    """Steps after which an inverse square root is 1 / sqrt(2); None: those of warm-up."""

    @classmethod
    def of(cls, config: TrainingConfig) -> Schedule:
        """As the settings of a stage say."""
        return cls(
            fall=config.lr_scheduler_type,
            warmup_ratio=config.warmup_ratio,
            warmup_steps=config.warmup_steps,
            decay_ratio=config.lr_decay_ratio,
            floor=config.min_lr_ratio,
            decay=config.lr_decay_type,
            cycles=config.lr_num_cycles,
            power=config.lr_power,
            timescale=config.lr_timescale,
        )

    def warmup(self, total: int) -> int:
        """Steps that rise, of `total`."""
        return math.ceil(self.warmup_ratio * total) if self.warmup_steps is None else min(self.warmup_steps, total)

    def factor(self, step: int, total: int) -> float:
        """Of optimizer step `step` (from 0) of `total`."""
        warmup = self.warmup(total)
        if step < warmup:
            return step / warmup
        place = Place(step - warmup, total - warmup, math.ceil(self.decay_ratio * total), warmup)
        high = FALLS[self.fall](place, self)
        return self.floor + (1.0 - self.floor) * high


@dataclass(frozen=True)
class Place:
    """A step after warm-up among those that follow it, and how many of them, the last ones, are for decay."""

    step: int
    steps: int
    decay: int
    warmup: int
    """Steps before."""

    @property
    def done(self) -> float:
        """Share of the steps, from 0 to below 1."""
        return self.step / max(1, self.steps)


def _half_wave(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: _half_wave(1.0 - left),
    "1-sqrt": lambda left: 1.0 - math.sqrt(1.0 - left),
}
"""Name -> factor of the peak, by the share of the decay that is left: from 1 towards 0."""


def _stable(place: Place, schedule: Schedule) -> float:
    """At the peak, then down (Hu et al., arXiv:2404.06395; 1-sqrt: Hägele et al., arXiv:2405.18392)."""
    decay = min(place.decay, place.steps)
    return DECAYS[schedule.decay](min(1.0, (place.steps - place.step) / max(1, decay)))


def _inverse_sqrt(place: Place, schedule: Schedule) -> float:
    """1 / sqrt(steps after warm-up in timescales, from 1 on); with the warm-up as timescale that of arXiv:1706.03762,
    section 5.3."""
    timescale = schedule.timescale or place.warmup or _TIMESCALE
    return 1.0 / math.sqrt((place.step + timescale) / timescale)


FALLS: Mapping[str, Callable[[Place, Schedule], float]] = {
    "linear": lambda place, _: 1.0 - place.done,
    "cosine": lambda place, _: _half_wave(place.done),
    RESTARTS: lambda place, schedule: _half_wave(schedule.cycles * place.done % 1.0),
    POLYNOMIAL: lambda place, schedule: (1.0 - place.done) ** schedule.power,
    INVERSE_SQRT: _inverse_sqrt,
    "constant": lambda place, _: 1.0,
    STABLE: _stable,
}
"""Name -> factor of the peak, from 1 towards 0."""
