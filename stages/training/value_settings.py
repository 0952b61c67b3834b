"""How rewards of completions become advantages of tokens, and how values learn: settings of PPO, as in TRL."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

from pydantic import Field

from stages.stage import Config

VALUE_MODEL = "value_model"
"""Name of the input and of the output that are a value model of its own."""
VALUE_PARTS = ("value_head.", f"{VALUE_MODEL}.")
"""How the names of the weights begin that say values: of a head on the policy, or of a model beside it."""


class ValueConfig(Config):
    """Generalized advantage estimation, the KL penalty in the reward, the value loss."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a reward by every token in between."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda (arXiv:1506.02438): 1 goes by the rewards that came, 0 by the next value alone."""
    whiten_rewards: bool = False
    """Divide the rewards of tokens by their standard deviation over the generation."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL divergence from the reference in the reward of every token; at 0 no reference is loaded."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Of the divergence at a token: its log-ratio (k1), or what is never negative (k3)."""
    kl_target: float | None = Field(None, gt=0)
    """KL divergence of a completion that kl_coef is adapted to (arXiv:1909.08593); null: kl_coef stays."""
    kl_horizon: int = Field(10000, gt=0)
    """Completions over which kl_coef is adapted."""
    vf_coef: float = Field(0.1, gt=0)
    """Weight of the value loss beside the policy's."""
    cliprange_value: float = Field(0.2, gt=0)
    """Values learn while they are within so much of those at sampling time."""
    value_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the value head or the value model; null: learning_rate."""
    save_value_model: bool = False
    """Output `value_model` is the value model as it is in the end, in the form of a reward model, to go on with."""

    def rate_scale(self, name: str) -> float:
        """What says values learns at a rate of its own."""
        if self.value_learning_rate is None or not name.startswith(VALUE_PARTS):
            return super().rate_scale(name)  # type: ignore[misc, no-any-return]
        rate: float = self.learning_rate  # type: ignore[attr-defined]
        return self.value_learning_rate / rate


def value_problems(config: ValueConfig, wired: Set[str]) -> list[str]:
    """What is wrong with the fields together, and with the inputs."""
    problems = _kl_problems(config)
    if config.save_value_model and VALUE_MODEL not in wired:
        problems.append(
            f"save_value_model is of a value model of its own, and input {VALUE_MODEL} is not wired in; wire a reward "
            "model or the SFT model in, or leave save_value_model out"
        )
    return problems


def _kl_problems(config: ValueConfig) -> list[str]:
    fields = ValueConfig.model_fields
    if config.kl_target is not None and not config.kl_coef:
        return ["kl_target adapts kl_coef, which is 0 and would stay so; give it a start"]
    if config.kl_target is None and config.kl_horizon != fields["kl_horizon"].default:
        return ["kl_horizon would do nothing without kl_target; leave it out"]
    if not config.kl_coef and config.kl_estimator != fields["kl_estimator"].default:
        return ["kl_estimator would do nothing with kl_coef 0; leave it out"]
    return []
