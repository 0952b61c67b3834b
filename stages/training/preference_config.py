"""Settings of preference optimization, and what does not go together in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from stages.losses.f_divergence import F_DIVERGENCES
from stages.losses.preference import PREFERENCE_LOSSES
from stages.losses.registry import Loss
from stages.training.config import MeasuredConfig, PolicyConfig, check_measured
from stages.training.length_settings import ReferencedConfig, one_reference

if TYPE_CHECKING:
    LossName = str
    DivergenceName = str
else:  # the tables of losses are what may be chosen
    LossName = Literal[tuple(PREFERENCE_LOSSES)]
    DivergenceName = Literal[tuple(F_DIVERGENCES)]

LOSS_PARAMETERS = {
    "label_smoothing",
    "discopop_tau",
    "simpo_gamma",
    "alpha",
    "cpo_alpha",
    "tpo_alpha",
    "tpo_l_gamma",
}
"""Fields that only some losses take."""


class PairLossConfig(PolicyConfig):
    """How pairs become a loss."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    loss_type: LossName | tuple[LossName, ...] = "sigmoid"
    """One of the table of preference losses in docs/training.md, or several, whose weighted sum is the loss (MPO)."""
    loss_weights: tuple[float, ...] | None = None
    """A weight for each of several losses; null: 1 each."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference; of losses without one, the scale of the margin."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong (conservative DPO)."""
    f_divergence_type: DivergenceName = "reverse_kl"
    """The divergence from the reference that holds the model (f-DPO); for losses of the margin."""
    f_alpha_divergence_coef: float = 0.5
    """The coefficient of alpha_divergence."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """LD-DPO: weight of tokens beyond the shorter completion's length; null: all count in full."""
    use_weighting: bool = False
    """WPO: weigh each pair by how likely the model is to write it."""
    sync_ref_model: bool = False
    """TR-DPO: the reference follows the model."""
    ref_model_follows: Literal["model", "average"] = "model"
    """What the reference is moved towards: the model as it is, or its averaged weights (weight_averaging)."""
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1)
    """Their share when the reference is moved; the rest is the old reference."""
    ref_model_sync_steps: int = Field(512, gt=0)
    """Steps between two moves of the reference; 1 with a small share is a moving average."""
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of discopop's blend."""
    simpo_gamma: float = 0.5
    """Target margin of simpo and alphapo."""
    alpha: float = 0.25
    """Exponent of alphapo's reward; 0 is simpo."""
    cpo_alpha: float = Field(1.0, ge=0)
    """Weight of the likelihood term of cpo, cpo_hinge and cpo_ipo."""
    tpo_alpha: float = Field(1.0, ge=0)
    """Weight of the gold completion's likelihood in tpo, tpo_l and kin."""
    tpo_l_gamma: float = 0.5
    """Target margin of tpo_l."""

    @field_validator("loss_type", mode="after")
    @classmethod
    def _one_is_a_name(cls, names: Any) -> Any:
        """A list of one means the one: equal settings have one fingerprint."""
        return names[0] if isinstance(names, tuple) and len(names) == 1 else names

    @property
    def losses(self) -> list[Loss]:
        """The chosen losses, in order."""
        names = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return [PREFERENCE_LOSSES[name] for name in names]

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference."""
        return any(loss.reference for loss in self.losses)


class PreferenceConfig(ReferencedConfig, PairLossConfig, MeasuredConfig):
    """Settings of preference optimization."""


def check(config: PreferenceConfig, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = one_reference(wired)
    if config.sync_ref_model and "reference_logprobs" in wired:
        problems.append("sync_ref_model moves the reference, so reference_logprobs would not hold; wire reference")
    if not config.needs_reference:
        problems += [
            f"input {name} is wired in, but {names_of(config.losses)} has no reference"
            for name in ("reference_logprobs", "reference", "eval_reference_logprobs")
            if name in wired
        ]
    return problems + check_measured(config, wired) + loss_problems(config)


def loss_problems(config: PairLossConfig) -> list[str]:
    """What is wrong with the losses and their settings."""
    return _weight_problems(config) + _parameter_problems(config) + _variant_problems(config)


def names_of(losses: Sequence[Loss]) -> str:
    return ", ".join(loss.name for loss in losses)


def _weight_problems(config: PairLossConfig) -> list[str]:
    losses, weights = config.losses, config.loss_weights
    if not losses:
        return ["loss_type names no loss"]
    if weights is None or len(weights) == len(losses):
        return []
    return [f"loss_weights has {len(weights)} numbers for {len(losses)} losses"]


def _parameter_problems(config: PairLossConfig) -> list[str]:
    """Parameters that were given and nothing takes, and those that a loss needs."""
    taken = {name for loss in config.losses for name in loss.parameters}
    given = {name for name, field in type(config).model_fields.items() if getattr(config, name) != field.default}
    problems = []
    for name in sorted((LOSS_PARAMETERS - taken) & given):
        takers = [loss for loss in PREFERENCE_LOSSES.values() if name in loss.parameters]
        problems.append(f"{name} is of loss_type {names_of(takers)}; {names_of(config.losses)} has none")
    if "f_alpha_divergence_coef" in given and config.f_divergence_type != "alpha_divergence":
        problems.append(f"f_alpha_divergence_coef is of alpha_divergence, not of {config.f_divergence_type}")
    for name in sorted({"ref_model_follows", "ref_model_mixup_alpha", "ref_model_sync_steps"} & given):
        if not config.sync_ref_model:
            problems.append(f"{name} is given, but sync_ref_model is false, so it would not be used")
    if config.ref_model_follows == "average" and config.weight_averaging is None:
        problems.append("ref_model_follows is average, but no weights are averaged; give weight_averaging too")
    for loss in config.losses:
        problems += [f"loss_type {loss.name} needs {name} above 0" for name in loss.needs if not getattr(config, name)]
    return problems


def _variant_problems(config: PairLossConfig) -> list[str]:
    """Variants that a chosen loss cannot take."""
    problems = []
    fixed = [loss for loss in config.losses if loss.reference and not loss.f_divergence]
    if config.f_divergence_type != "reverse_kl" and (fixed or not config.needs_reference):
        whose = fixed or config.losses
        problems.append(
            f"f_divergence_type {config.f_divergence_type} is of losses of the margin; not {names_of(whose)}"
        )
    if config.ld_alpha is not None and not config.needs_reference:
        problems.append(f"ld_alpha is of losses with a reference; {names_of(config.losses)} has none")
    coupling = [loss for loss in config.losses if loss.couples_rows]
    if config.sync_ref_model and not config.needs_reference:
        problems.append(f"sync_ref_model is of losses with a reference; {names_of(config.losses)} has none")
    if config.sync_ref_model and config.lora_r is not None:
        problems.append("sync_ref_model needs the whole model trained; with lora_r only adapters are")
    plain = [loss for loss in config.losses if not loss.reference]
    if config.ld_alpha is not None and coupling and plain:
        problems.append(f"ld_alpha weighs tokens in {names_of(coupling)}, not in {names_of(plain)}; choose one")
    if config.use_weighting and coupling:
        problems.append(f"use_weighting weighs single pairs; {names_of(coupling)} compares the pairs of a step")
    if coupling and any(loss.gold for loss in config.losses):
        problems.append(f"{names_of(coupling)} and the losses of triple preferences cannot be added up; choose one")
    return problems
