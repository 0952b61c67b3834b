"""Settings of distillation, and what does not go together in them. Imports no torch."""

from __future__ import annotations

from pydantic import Field, field_validator

from stages.data.columns import template_fields
from stages.data.types import TEXT_COLUMNS
from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import OverlappedEngineChoice
from stages.training.config import PolicyConfig, check_measured
from stages.training.cross_settings import CrossTokenizer, cross_problems
from stages.training.eval_settings import SampledMeasuringConfig, eval_sampling_problems
from stages.training.overlap_settings import correction_needed, sampling_problems
from stages.training.sampled_settings import SampledLossConfig, sampled_problems
from stages.training.teacher_settings import TeachersConfig, teacher_problems


class Config(SampledLossConfig, OverlappedEngineChoice, TeachersConfig, PolicyConfig, SampledMeasuringConfig):
    """Settings of distillation. An item of train_batch_size is a prompt with one completion."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    beta: float = Field(1.0, ge=0, le=1)
    """0: forward KL (teacher to student), 1: reverse KL, between: generalized Jensen-Shannon divergence."""
    lmbda: float = Field(1.0, ge=0, le=1)
    """Share of steps on the student's own completions; the others use the dataset's."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits, and the student's when it samples."""
    max_completion_length: int = Field(256, gt=0)
    """Most tokens of a sampled completion."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens (prompt, where completions are sampled; the teacher's too)."""
    loss_top_k: int | None = Field(None, gt=0)
    """Compare the teacher's so many likeliest tokens one by one, and all others by what they sum to; null: every token
    by itself."""
    cross_tokenizer: CrossTokenizer | None = None
    """For a teacher with another tokenizer: how the two are compared, over tokens that end at the same byte of a text;
    `{}`: probabilities by their rank. null: they have one tokenizer."""
    teacher_prompt_template: str = "{prompt}\n\n{privileged_context}"
    """What the teacher sees of privileged_context rows in place of the prompt, or of its last user message."""
    teacher_update_rate: float | None = Field(None, gt=0, le=1)
    """Without input teacher: how far its weights move towards the model's at an update; null: they stay."""
    teacher_sync_steps: int = Field(1, gt=0)
    """Steps between two updates of the teacher."""

    @field_validator("teacher_prompt_template")
    @classmethod
    def _has_both_fields(cls, value: str) -> str:
        needed, found = TEXT_COLUMNS["privileged_context"], template_fields(value)
        if set(found) != set(needed):
            raise ValueError(f"takes the fields {' and '.join(needed)}, found {', '.join(found) or 'none'}")
        return value


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with configuration and inputs together."""
    problems = engine_problems(config, None) + sampling_problems(config)
    if config.rollouts.is_apart and config.lmbda == 0:
        problems.append(f"rollouts.engine is {config.rollouts.engine}, but lmbda is 0, so nothing is sampled")
    if config.structured is not None and config.lmbda == 0:
        problems.append("structured is given, but lmbda is 0, so nothing is sampled")
    problems += teacher_problems(config, wired) + _kept_problems(config, wired) + cross_problems(config, wired)
    problems += sampled_problems(config, wired)
    if config.sampled_loss is not None:
        problems += correction_needed(config)
    moves = config.teacher_update_rate is not None
    if not {"teacher", "teacher_states"} & wired and config.lmbda != 1:
        problems.append(
            f"without input teacher the model teaches itself, on completions that it samples: lmbda is {config.lmbda}, "
            "and must be 1; or wire a teacher, or teacher_states"
        )
    if "teacher" in wired and moves:
        problems.append("teacher_update_rate is of a model that teaches itself; input teacher stays as it is")
    if moves and config.lora_r is not None:
        problems.append("teacher_update_rate needs the whole model trained; with lora_r only adapters are")
    if config.teacher_sync_steps != 1 and not moves:
        problems.append("teacher_sync_steps is given, but teacher_update_rate is null, so it would not be used")
    return problems + check_measured(config, wired, "teacher_states") + eval_sampling_problems(config)


def _kept_problems(config: Config, wired: frozenset[str]) -> list[str]:
    """Of a teacher that has said what it knows."""
    if "teacher_states" not in wired:
        return []
    problems = []
    if "teacher" in wired:
        problems.append("inputs teacher and teacher_states exclude each other; wire one of them")
    if config.lmbda != 0 and config.sampled_loss is None:  # which says itself what it needs
        problems.append(
            f"lmbda is {config.lmbda:g}, but teacher_states are of the dataset's completions: use lmbda 0, or wire "
            "teacher in their place"
        )
    if config.teacher_update_rate is not None:
        problems.append("teacher_update_rate is of a model that teaches itself; teacher_states stay as they are")
    return problems
