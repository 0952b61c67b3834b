"""Settings of distillation by policy gradients, and what does not go together in them. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.losses.sampled_distillation import SAMPLED_LOSSES, SampledLoss
from stages.training.correction_settings import CorrectionConfig, correction_problems
from stages.training.rollout_settings import dropout_problems, sampler_tolerance

if TYPE_CHECKING:
    from stages.training.sampled_distillation import SampledSettings

    LossName = str
else:  # the table of losses is what may be chosen
    LossName = Literal[("divergence", *SAMPLED_LOSSES)]

PARAMETERS = {name for loss in SAMPLED_LOSSES.values() for name in loss.parameters}
"""Fields that only some losses take."""


class SampledLossConfig(CorrectionConfig):
    """What is learnt of a teacher: its distributions, or, by policy gradients, its judgement of what was sampled."""

    loss_type: LossName = "divergence"
    """divergence: that of `beta`, at every token; by policy gradients on tokens that the student sampled, which need
    the teacher's probability of these alone: iw_opd, whose weights fall with what has come between student and teacher
    before, or minillm, where a token also counts for what follows it."""
    iw_opd_gamma: float = Field(0.5, ge=0)
    """What the first token of a completion counts above 1 in iw_opd; 0: all tokens count alike."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount in minillm of what follows a token, for every token between."""
    length_normalization: bool = True
    """In minillm what follows counts by its mean, not by its sum, which is larger early in a completion."""
    single_step_decomposition: bool = True
    """In minillm the exact reverse KL divergence stands for a token itself, and its credit is what follows it. Ratios
    of a sequence (`importance_sampling_mode`) count for the divergence too; a token's own do not, for the divergence
    does not depend on the token."""

    @property
    def sampled_loss(self) -> SampledLoss | None:
        """The policy gradient's; None: whole distributions are compared."""
        return SAMPLED_LOSSES.get(self.loss_type)

    @property
    def compares_all(self) -> bool:
        """Whether what a teacher says of all tokens counts, and not the sampled token's probability alone."""
        return self.sampled_loss is None or self.decomposes

    @property
    def decomposes(self) -> bool:
        """Whether a policy gradient has the exact divergence beside it."""
        loss = self.sampled_loss
        return loss is not None and "single_step_decomposition" in loss.parameters and self.single_step_decomposition

    @property
    def couples_tokens(self) -> bool:
        """Whether the gradient of a token may depend on other tokens' log-probabilities."""
        correction = self.correction if self.sampled_loss is not None else None
        return correction is not None and not correction.mode.of_single_tokens

    def sampled_settings(self, temperature: float) -> SampledSettings:
        """What the objective needs to know of a loss by policy gradients."""
        from stages.training.sampled_distillation import SampledSettings

        loss = self.sampled_loss
        assert loss is not None
        return SampledSettings(
            loss=loss,
            parameters={name: getattr(self, name) for name in loss.parameters},
            temperature=temperature,
            decomposes=self.decomposes,
            correction=self.correction,
            tolerance=sampler_tolerance(self),
        )


def sampled_problems(config: Any, wired: frozenset[str]) -> list[str]:
    """What does not go together in a distillation's settings with these in them."""
    fields, loss = type(config).model_fields, config.sampled_loss
    unused = PARAMETERS - set(() if loss is None else loss.parameters)
    problems = [
        f"{name} is of loss_type {_taker(name)}, and it is {config.loss_type}: leave it out"
        for name in sorted(unused)
        if getattr(config, name) != fields[name].default
    ]
    problems += correction_problems(config)
    if loss is None:
        if "importance_sampling_mode" in config.model_fields_set and config.importance_sampling_mode is not None:
            problems.append(
                f"importance_sampling_mode is of policy gradients (loss_type {', '.join(SAMPLED_LOSSES)}); a "
                "divergence is exact whoever wrote the tokens before: leave it out"
            )
        return problems
    return problems + dropout_problems(config) + _combined(config, wired)


def _taker(name: str) -> str:
    return ", ".join(loss.name for loss in SAMPLED_LOSSES.values() if name in loss.parameters)


def _combined(config: Any, wired: frozenset[str]) -> list[str]:
    """Of a policy gradient with the other settings of a distillation."""
    name, problems = f"loss_type {config.loss_type}", []
    if "teacher_states" in wired:
        problems.append(
            f"{name} asks a teacher of what the student samples, and teacher_states are of the dataset's completions: "
            "wire teacher in their place, or take loss_type divergence with lmbda 0"
        )
    elif config.lmbda != 1:
        problems.append(
            f"lmbda is {config.lmbda:g}, but {name} learns from what the student samples, and nothing else: use lmbda 1"
        )
    if config.beta != type(config).model_fields["beta"].default:
        problems.append(f"beta is {config.beta:g}, but {name} is of the reverse KL divergence: leave beta out")
    if config.loss_top_k is not None:
        problems.append(f"loss_top_k is of loss_type divergence; {name} asks for the sampled token alone: leave it out")
    if config.cross_tokenizer is not None:
        problems.append(
            f"cross_tokenizer is of loss_type divergence; {name} needs the probability of the student's own tokens: "
            "leave it out"
        )
    if config.decomposes and config.teacher_engine.is_apart:
        problems.append(
            "single_step_decomposition needs the teacher's whole distribution, and teacher_engine tells the sampled "
            "token's probability: give single_step_decomposition: false, or leave teacher_engine out"
        )
    if config.decomposes and config.gamma == 0:
        problems.append(
            f"with gamma 0 and single_step_decomposition nothing of {name} is left but the reverse KL divergence, "
            "which is loss_type divergence: raise gamma, or take that"
        )
    if "eval_dataset" in wired and config.eval_temperature != config.temperature:
        problems.append(
            f"eval_temperature is {config.eval_temperature:g}, but {name} knows the divergence from what is drawn as "
            f"in training: give eval_temperature: {config.temperature:g}"
        )
    return problems
