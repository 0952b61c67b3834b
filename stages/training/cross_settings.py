"""Settings of distillation between models of different tokenizers. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from stages.stage import Config


class CrossTokenizer(Config):
    """How tokens are compared that are not the same in student and teacher."""

    loss_type: Literal["uld", "hybrid"] = "uld"
    """uld: probabilities by their rank; hybrid: those of tokens that both have one by one (by `beta`), the others by
    rank."""
    token_merge_strategy: Literal["observed", "bayesian"] = "observed"
    """Which token's distribution a group of several has, times the probability of its other tokens: the first's
    (observed) or the last's (bayesian)."""
    matched_weight: float | None = Field(None, ge=0)
    """Of the tokens that both have, in hybrid; null: the share of the teacher's vocabulary that they are."""
    unmatched_weight: float | None = Field(None, ge=0)
    """Of the others; null: 1 - that share."""
    crossentropy_weight: float = Field(0.0, ge=0)
    """Of the cross-entropy of given completions beside the divergence."""
    student_temperature: float | None = Field(None, gt=0)
    """Divides the student's logits where they are compared; null: `temperature`."""
    teacher_temperature: float | None = Field(None, gt=0)
    """Divides the teacher's logits; null: `temperature`."""
    skip_eos: bool = False
    """Do not compare how likely both find the end of a completion."""


def cross_problems(config: Any, wired: frozenset[str]) -> list[str]:
    """What does not go together in a distillation's settings with these in them."""
    cross: CrossTokenizer | None = config.cross_tokenizer
    if cross is None:
        return []
    name = "cross_tokenizer"
    problems = []
    if "teacher_states" in wired:
        problems.append(f"{name} needs input teacher; teacher_states are of the student's own tokens")
    elif "teacher" not in wired:
        problems.append(f"{name} needs input teacher; a model that teaches itself has one tokenizer: leave it out")
    if config.loss_top_k is not None:
        problems.append(f"loss_top_k is of tokens that both know, and {name} of tokenizers that differ: leave it out")
    if config.teacher_engine.is_apart:
        problems.append(
            f"teacher_engine sends likely tokens, and {name} needs the probability of every one; leave it out"
        )
    given = [one for one in ("matched_weight", "unmatched_weight") if getattr(cross, one) is not None]
    if cross.loss_type == "hybrid" and len(given) == 1:
        problems.append(f"{name}.{given[0]} is given alone; give matched_weight and unmatched_weight, or neither")
    if cross.loss_type != "hybrid":
        problems += [f"{name}.{one} is of loss_type hybrid, and it is {cross.loss_type}: leave it out" for one in given]
        if config.beta != type(config).model_fields["beta"].default:
            problems.append(
                f"beta is {config.beta:g}, but {name}.loss_type is uld, which has none: leave it out, or use hybrid"
            )
    if cross.crossentropy_weight and config.lmbda == 1:
        problems.append(
            f"{name}.crossentropy_weight is of given completions, and with lmbda 1 there are none: lower lmbda, or "
            "leave it out"
        )
    return problems
