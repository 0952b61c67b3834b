"""Settings of a policy's loss, and what does not go together in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.losses.policy import POLICY_LOSSES, Surrogate
from stages.losses.policy_correction import MODES
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import LOG_RATIOS
from stages.stage import Config
from stages.training.correction_settings import CorrectionConfig, correction_problems

if TYPE_CHECKING:
    from stages.training.entropy_bonus import EntropyBonus
    from stages.training.policy_terms import PolicySettings

    LossName = str
    Level = str
    Estimator = str
else:  # the tables of losses are what may be chosen
    LossName = Literal[tuple(POLICY_LOSSES)]
    Level = Literal[tuple(LOG_RATIOS)]
    Estimator = Literal[tuple(KL_ESTIMATORS)]

PARAMETERS = {name for loss in POLICY_LOSSES.values() for name in loss.parameters}
"""Fields that only some losses take."""


class PolicyLossConfig(CorrectionConfig):
    """How log-probabilities and advantages become a loss."""

    loss_type: LossName = "dapo"
    """One of `rl`'s in the table of objectives, docs/training.md. Those of GRPO differ in how token losses are
    averaged: in each sequence first (grpo), over all tokens (dapo, bnpo), or over a constant number of tokens
    (dr_grpo)."""
    importance_sampling_level: Level | None = None
    """What a ratio of new to old probability is of: a token, a sequence's mean (GSPO), a sequence's sum (RLOO), or in
    value the sequence's mean and in gradient the token (sequence_token, GSPO-token); null: what the loss asks for."""
    epsilon: float | None = Field(None, gt=0)
    """Ratios are clipped below at 1 - epsilon, of gmpo log-ratios at -epsilon; null: 0.2, of gmpo 0.4."""
    epsilon_high: float | None = Field(None, gt=0)
    """Ratios are clipped above at 1 + epsilon_high, null: as epsilon; of cispo the largest ratio itself, such as 5."""
    delta: float | None = Field(None, gt=0)
    """Two-sided clip (INTELLECT-2, arXiv:2505.07291): most that a ratio counts where the advantage is negative."""
    sapo_temperature_pos: float = Field(1.0, gt=0)
    """Temperature of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: float = Field(1.05, gt=0)
    """Temperature of sapo's gate elsewhere; higher ones close it sooner."""
    vespo_k_pos: float = Field(2.0, gt=0)
    """Exponent of the ratio in vespo's weight where the advantage is not negative."""
    vespo_lambda_pos: float = Field(3.0, gt=0)
    """Decay of vespo's weight with the ratio where the advantage is not negative."""
    vespo_k_neg: float = Field(3.0, gt=0)
    """The exponent where the advantage is negative."""
    vespo_lambda_neg: float = Field(2.0, gt=0)
    """The decay where the advantage is negative."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the reference; at 0 no reference is loaded."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Where the divergence counts: in the loss of every token (GRPO), or off the reward of the completion (RLOO)."""
    kl_estimator: Estimator | None = None
    """Estimate of the divergence from a token's d = log p_ref - log p: -d (k1), d^2 / 2 (k2), e^d - d - 1 (k3); null:
    k3 in the loss, k1 in the reward."""
    use_bias_correction_kl: bool = False
    """Multiply the divergence in the loss by the ratio, which makes its gradient exact (arXiv:2512.02556). TRL 1.16 has
    it on."""
    off_policy_mask_threshold: float | None = Field(None, gt=0)
    """Leave completions worse than their baseline out where sampler and policy differ by more than this, in nats a
    token on average (arXiv:2512.02556)."""
    top_entropy_quantile: float = Field(1.0, gt=0, le=1)
    """Learn from this share of a step's tokens, those of the highest entropy (arXiv:2506.01939); below 1 a step has one
    pass more."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean entropy of the tokens' distributions, which is taken off the loss."""
    use_adaptive_entropy: bool = False
    """Let entropy_coef follow entropy_target (arXiv:2505.22312)."""
    entropy_coef_min: float = Field(0.0, ge=0)
    """Lowest coefficient that it falls to."""
    entropy_coef_max: float = Field(1.0, ge=0)
    """Highest coefficient that it rises to."""
    entropy_coef_delta: float = Field(0.005, gt=0)
    """What it changes by in a step."""
    entropy_target: float = Field(0.2, ge=0)
    """Entropy in nats at or below which the coefficient rises and the bonus is given."""

    @property
    def loss(self) -> Surrogate:
        """The chosen loss."""
        return POLICY_LOSSES[self.loss_type]

    @property
    def couples_tokens(self) -> bool:
        """Whether the gradient of a token may depend on other tokens' log-probabilities."""
        by_sequence = (self.importance_sampling_level or self.loss.level) != "token" or self.loss.couples_tokens
        mode = self.importance_sampling_mode
        corrected = mode is not None and not MODES[mode].of_single_tokens
        return by_sequence or corrected or self.off_policy_mask_threshold is not None

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has the entropy in it."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def penalizes_loss(self) -> bool:
        """Whether the loss has the divergence from the reference in it."""
        return self.beta > 0 and self.kl_placement == "loss"

    @property
    def penalizes_reward(self) -> bool:
        """Whether rewards have the divergence from the reference taken off."""
        return self.beta > 0 and self.kl_placement == "reward"

    def policy_settings(self, *, temperature: float, longest: int, tolerance: float | None) -> PolicySettings:
        """What the objective needs to know."""
        from stages.training.policy_terms import PolicySettings

        given: dict[str, Any] = {name: getattr(self, name) for name in self.loss.parameters}
        return PolicySettings(
            loss=self.loss,
            temperature=temperature,
            max_completion_length=longest,
            tolerance=tolerance,
            parameters={name: value for name, value in given.items() if value is not None},
            importance_sampling_level=self.importance_sampling_level,
            beta=self.beta if self.penalizes_loss else 0.0,
            compares_reference=self.penalizes_reward,
            kl_estimator=self.kl_estimator or ("k1" if self.penalizes_reward else "k3"),
            use_bias_correction_kl=self.use_bias_correction_kl,
            correction=self.correction,
            off_policy_mask_threshold=self.off_policy_mask_threshold,
        )

    def entropy_bonus(self) -> EntropyBonus | None:
        """The bonus at the beginning of the run."""
        from stages.training.entropy_bonus import EntropyBonus, Target

        if not self.has_entropy_bonus:
            return None
        target = Target(self.entropy_target, self.entropy_coef_delta, self.entropy_coef_min, self.entropy_coef_max)
        return EntropyBonus(self.entropy_coef, target if self.use_adaptive_entropy else None)


def policy_problems(config: PolicyLossConfig, *, ever_off_policy: bool) -> list[str]:
    """What is wrong with the fields together. `ever_off_policy`: completions are used again after their first step, or
    are drawn from a distribution that is not quite the policy's."""
    problems = _loss_problems(config) + _kl_problems(config) + _correction_problems(config) + _entropy_problems(config)
    if config.off_policy_mask_threshold is not None and not ever_off_policy:
        problems.append(
            "off_policy_mask_threshold is given, but every step is on policy, so nothing would be masked; it is for "
            "steps_per_generation or num_iterations above 1, or a sampler with top_p, top_k, min_p or a "
            "repetition_penalty"
        )
    return problems


def given_fields(config: Config, names: Iterable[str]) -> list[str]:
    """Those of the names that are fields and not as they are where a recipe says nothing."""
    fields = type(config).model_fields
    return sorted(name for name in names if name in fields and getattr(config, name) != fields[name].default)


def _names(losses: Sequence[Surrogate]) -> str:
    return ", ".join(loss.name for loss in losses)


def _loss_problems(config: PolicyLossConfig) -> list[str]:
    loss, problems = config.loss, []
    for name in given_fields(config, PARAMETERS - set(loss.parameters)):
        takers = [one for one in POLICY_LOSSES.values() if name in one.parameters]
        problems.append(f"{name} is of loss_type {_names(takers)}; {loss.name} has none")
    level, highest = config.importance_sampling_level, config.epsilon_high
    if loss.only_level and level not in (None, loss.level):
        problems.append(
            f"loss_type {loss.name} has ratios of its own ({loss.level}), not importance_sampling_level {level}"
        )
    if loss.name == "cispo" and (highest is None or highest <= 1):
        problems.append(
            f"loss_type cispo bounds the ratio itself at epsilon_high, found {highest}: every ratio of 1 would be "
            "clamped; give a number above 1, such as 5"
        )
    bound = 1 + (highest or config.epsilon or 0.2)
    if config.delta is not None and "delta" in loss.parameters and config.delta <= bound:
        problems.append(f"delta {config.delta} is no bound beyond that of epsilon_high; give a number above {bound:g}")
    return problems


def _kl_problems(config: PolicyLossConfig) -> list[str]:
    given = given_fields(config, ("kl_placement", "kl_estimator", "use_bias_correction_kl"))
    if not config.beta:
        return [f"{name} is given, but beta is 0, so it would not be used" for name in given]
    if config.penalizes_reward and config.use_bias_correction_kl:
        return ["use_bias_correction_kl is of kl_placement loss; in the reward the divergence has no gradient"]
    if config.penalizes_loss and config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        return [
            "kl_estimator k1 in the loss has a gradient that is zero on average; give use_bias_correction_kl: true, or "
            "kl_placement: reward"
        ]
    return []


def _correction_problems(config: PolicyLossConfig) -> list[str]:
    mode, problems = config.importance_sampling_mode, correction_problems(config)
    if mode is not None and config.loss.weighs_corrections and not MODES[mode].of_single_tokens:
        names = ", ".join(name for name, one in MODES.items() if one.of_single_tokens)
        problems.append(f"loss_type {config.loss_type} multiplies the corrections of tokens; give one of {names}")
    return problems


def _entropy_problems(config: PolicyLossConfig) -> list[str]:
    follows = {"entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"}
    if not config.use_adaptive_entropy:
        unused = given_fields(config, follows)
        return [f"{name} is given, but use_adaptive_entropy is false, so it would not be used" for name in unused]
    low, high = config.entropy_coef_min, config.entropy_coef_max
    if low <= config.entropy_coef <= high:
        return []
    return [f"entropy_coef {config.entropy_coef} is not between entropy_coef_min {low} and entropy_coef_max {high}"]
