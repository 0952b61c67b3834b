"""Settings of a policy that teaches itself from what it did well, and what does not go together in them. Imports no
torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from stages.data.columns import template_fields
from stages.stage import CodeRef, Config
from stages.training.advantage_settings import AdvantageConfig
from stages.training.policy_settings import PolicyLossConfig, given_fields
from stages.training.rollout_settings import JudgedConfig

_FIELDS = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


class SelfTeachingConfig(Config):
    """What the teacher reads in place of a prompt, which of its weights it has, and how the policy is compared with it;
    the names and defaults of TRL's SDPOTrainer."""

    distillation_weight: float = Field(1.0, ge=0, le=1)
    """Weight of the distillation; the rest is that of `rl`'s loss. At 1 the policy's loss is not computed, at 0 nothing
    is taught."""
    distillation_alpha: float = Field(1.0, ge=0, le=1)
    """0: KL(teacher || policy), 1: KL(policy || teacher), between: generalized Jensen-Shannon divergence."""
    distillation_mode: Literal["sampled_token", "full_logits", "topk_logits"] = "sampled_token"
    """What is compared of a token: the probability of the one that was sampled, those of all, or those of the policy's
    distillation_topk likeliest."""
    distillation_topk: int | None = Field(None, gt=0)
    """Likeliest tokens that topk_logits compares."""
    distillation_add_tail: bool = False
    """All other tokens are one outcome more of topk_logits; false: the likeliest are scaled up to 1."""
    distillation_is_clip: float | None = Field(2.0, gt=0)
    """Most that a token counts by how much likelier the policy finds it than at sampling time; null: it counts 1."""
    teacher_model_kind: Literal["base", "ema", "live"] = "ema"
    """The teacher's weights: the model as it came, following the policy, or the policy itself."""
    teacher_update_rate: float = Field(0.05, gt=0, le=1)
    """How far ema moves towards the policy at an update."""
    teacher_sync_steps: int = Field(1, gt=0)
    """Steps between two updates of ema."""
    use_successful_as_teacher: bool = True
    """Show the teacher the first successful completion of the group."""
    success_reward_threshold: float = 1.0
    """Least reward of a completion that is shown for a solution."""
    dont_reprompt_on_self_success: bool = True
    """A completion is not its own solution."""
    remove_thinking_from_demonstration: bool = False
    """Leave what stands in <think> tags out of a solution; one of which nothing is left is none."""
    feedback_column: str | None = None
    """Column of the dataset with what the environment says of a row's completions; null: none."""
    feedback_function: CodeRef | None = None
    """`file.py:name` of what says it of each completion: called as a reward, it returns a text or None for each."""
    environment_feedback_only_without_solution: bool = False
    """Show feedback only where there is no solution."""
    max_reprompt_len: int = Field(10240, gt=1)
    """Longest prompt of the teacher in tokens; what would have a longer one is not taught, and counted."""
    reprompt_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    """What the teacher sees in place of the prompt, or of its last user message."""
    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    """What it says of a solution; nothing where there is none."""
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    """What it says of feedback; nothing where there is none."""

    @field_validator(*_FIELDS)
    @classmethod
    def _has_its_fields(cls, value: str, info: ValidationInfo) -> str:
        known, found = _FIELDS[str(info.field_name)], template_fields(value)
        if known[0] not in found or set(found) - set(known):
            takes = known[0] if len(known) == 1 else f"{known[0]}, and may have {' and '.join(known[1:])}"
            raise ValueError(f"takes the field {takes}; found {', '.join(found) or 'none'}")
        return value

    @property
    def has_feedback(self) -> bool:
        """Whether anything is said of completions."""
        return self.feedback_column is not None or self.feedback_function is not None


def self_teaching_problems(config: SelfTeachingConfig) -> list[str]:
    """What is wrong with the fields together, and of a policy's loss (`PolicyLossConfig`) beside them."""
    if config.distillation_weight == 0:
        fields = set(SelfTeachingConfig.model_fields) - {"distillation_weight"}
        return [
            f"{name} is given, but distillation_weight is 0, so nothing is taught"
            for name in given_fields(config, fields)
        ]
    problems = _comparison_problems(config) + _teacher_problems(config) + _prompt_problems(config)
    if config.distillation_weight == 1:
        problems += [
            f"{name} is of the policy's loss, which distillation_weight 1 leaves out; give less"
            for name in given_fields(config, PolicyLossConfig.model_fields)
        ]
        # rewards of different weights add up to what is a success
        problems += [
            f"{name} is of advantages, which distillation_weight 1 leaves out; give less"
            for name in given_fields(config, set(AdvantageConfig.model_fields) - set(JudgedConfig.model_fields))
        ]
    return problems


def _comparison_problems(config: SelfTeachingConfig) -> list[str]:
    mode, problems = config.distillation_mode, []
    if mode == "sampled_token" and config.distillation_alpha != 1:
        problems.append(
            f"distillation_alpha is {config.distillation_alpha:g}, but sampled_token estimates KL(policy || teacher), "
            "which is 1; for others give distillation_mode full_logits or topk_logits"
        )
    if mode == "topk_logits" and config.distillation_topk is None:
        problems.append("distillation_mode topk_logits needs distillation_topk, such as 100")
    if mode != "topk_logits":
        problems += [
            f"{name} is of distillation_mode topk_logits; {mode} has none"
            for name in given_fields(config, ("distillation_topk", "distillation_add_tail"))
        ]
    return problems


def _teacher_problems(config: SelfTeachingConfig) -> list[str]:
    if config.teacher_model_kind != "ema":
        return [
            f"{name} is of teacher_model_kind ema, not of {config.teacher_model_kind}"
            for name in given_fields(config, ("teacher_update_rate", "teacher_sync_steps"))
        ]
    if getattr(config, "lora_r", None) is None:
        return []
    return [
        "teacher_model_kind ema needs the whole model trained, and with lora_r only adapters are; give base, or live"
    ]


def _prompt_problems(config: SelfTeachingConfig) -> list[str]:
    found, problems = template_fields(config.reprompt_template), []
    if not config.use_successful_as_teacher and not config.has_feedback:
        problems.append(
            "the teacher would see no more than the policy: use_successful_as_teacher is false, and there is neither "
            "feedback_column nor feedback_function"
        )
    if config.feedback_column is not None and config.feedback_function is not None:
        problems.append("feedback_column and feedback_function exclude each other; give one of them")
    if config.feedback_function is not None and ":" not in config.feedback_function:
        problems.append(
            f"feedback_function names {config.feedback_function!r}, but none is built in; give file.py:name"
        )
    shown = {"solution": config.use_successful_as_teacher, "feedback": config.has_feedback}
    problems += [
        f"reprompt_template has no {{{name}}}, so the teacher would not see the {name}"
        for name, is_shown in shown.items()
        if is_shown and name not in found
    ]
    if not config.has_feedback:
        problems += [
            f"{name} is given, but there is neither feedback_column nor feedback_function"
            for name in given_fields(config, ("environment_feedback_only_without_solution", "feedback_template"))
        ]
    if not config.use_successful_as_teacher:
        fields = ("remove_thinking_from_demonstration", "dont_reprompt_on_self_success", "solution_template")
        problems += [
            f"{name} is of solutions, which use_successful_as_teacher: false leaves out"
            for name in given_fields(config, fields)
        ]
    return problems
