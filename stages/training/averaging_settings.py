"""Settings of averaged weights, which a run leaves in place of its last ones. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from stages.stage import Config, operational

_OF_BEMA = ("lag", "multiplier", "ema_power", "bias_power", "min_ema_multiplier")
_USUAL_STEPS = {"ema": 1, "bema": 400}


class WeightAveraging(Config):
    """How the weights of a run are averaged over its steps."""

    kind: Literal["ema", "bema"]
    """ema: an exponential moving average; bema: one whose lag behind the weights is corrected (arXiv:2508.00180)."""
    decay: float = Field(0.999, gt=0, lt=1)
    """What an update of ema leaves of the average before; the weights of the moment are the rest."""
    update_freq: int | None = Field(None, gt=0)
    """Steps between two updates; null: 1 of ema, 400 of bema."""
    update_after: int = Field(0, ge=0)
    """Steps before the average begins, with the weights of then; until then it is the weights themselves."""
    device: Literal["model", "cpu"] = operational("model")
    """Where the averages are kept: on the device that trains, or, beside a GPU, in pinned memory of the host, through
    which every update sends them up and back."""
    lag: float = Field(10.0, ge=0)
    """bema's rho: added to the steps that its factors fall with, so that the first updates are not too large."""
    multiplier: float = Field(1.0, ge=0)
    """bema's gamma: what these steps count."""
    ema_power: float = Field(0.5, ge=0)
    """bema's kappa: an update takes (rho + gamma step)^-kappa of the weights of the moment."""
    bias_power: float = Field(0.2, ge=0)
    """bema's eta: (rho + gamma step)^-eta of the way from the first weights is added to the average."""
    min_ema_multiplier: float = Field(0.0, ge=0, le=1)
    """The least that an update of bema takes."""

    @property
    def steps_between(self) -> int:
        """Steps between two updates."""
        return _USUAL_STEPS[self.kind] if self.update_freq is None else self.update_freq

    @property
    def numbers(self) -> int:
        """Those that are kept of every trained weight, in float32."""
        return {"ema": 2, "bema": 3}[self.kind]

    @property
    def first_update(self) -> int:
        """The step after which the average first differs from the weights that it began with."""
        return self.update_after + self.steps_between

    def updates(self, total: int) -> range:
        """The steps after which a run of so many updates the average."""
        return range(self.first_update, total + 1, self.steps_between)

    def beta(self, step: int) -> float:
        """What an update after so many steps takes of the weights of the moment."""
        if self.kind == "ema":
            return 1 - self.decay
        return max(math.pow(self.lag + self.multiplier * step, -self.ema_power), self.min_ema_multiplier)

    def alpha(self, step: int) -> float:
        """The share of the way from the first weights that is added to the average."""
        return 0.0 if self.kind == "ema" else math.pow(self.lag + self.multiplier * step, -self.bias_power)

    def share_of_first(self, total: int) -> float:
        """What the moving average of a run of so many steps still has of the weights that it began with."""
        share = 1.0
        for step in self.updates(total):
            share *= 1 - self.beta(step)
        return share

    def problem(self, total: int | None, stops_every: int | None) -> str | None:
        """Why a run of so many steps would not leave what is meant. `stops_every`: steps between measurements by which
        it may end. None: not known, or there are none; nothing is wrong."""
        if total is not None and self.first_update > total:
            return (
                f"weight_averaging: the first update is after step {self.first_update} (update_after + update_freq), "
                f"and the run has {total}: lower them, or leave it out"
            )
        if stops_every is not None and stops_every < self.steps_between:
            return (
                f"weight_averaging: the average is updated every {self.steps_between} steps and measured every "
                f"{stops_every}, so early_stopping_patience would count measurements of the same weights: lower "
                "update_freq, or raise eval_steps"
            )
        return None

    @model_validator(mode="after")
    def _its_kind_uses_what_is_given(self) -> Self:
        fields = type(self).model_fields
        for name in _OF_BEMA if self.kind == "ema" else ("decay",):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is of kind {'bema' if self.kind == 'ema' else 'ema'}, found {self.kind}")
        if self.kind == "bema" and (age := self.lag + self.multiplier * self.first_update) < 1:
            raise ValueError(
                f"lag + multiplier * {self.first_update}, the step of the first update, is {age:g}: below 1 it would "
                "take more than all of the weights of the moment; raise one of them"
            )
        return self
