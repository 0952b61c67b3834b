"""A teacher with a tokenizer of its own, beside the student: what `distill` trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.context import Context
from stages.data.open_prompts import room_for_prompts
from stages.data.privileged import teacher_prompt
from stages.data.readings import Reader
from stages.data.token_bytes import same_tokens
from stages.data.truncation import RowLimit
from stages.data.types import Row
from stages.training.cross_rows import CrossRows, Limits
from stages.training.cross_tokenizer import CrossTokenizerLoss, ReadingTeacher, cross_loss
from stages.training.generation import end_token_ids
from stages.training.loop import Trainer
from stages.training.start import frozen_scorer, tokenizer_of


def cross_teaching(
    context: Context,
) -> tuple[CrossTokenizerLoss, ReadingTeacher, Callable[[Trainer, Any], CrossRows]]:
    """The objective, the teacher, and what the two tokenizers make of rows. Raises DataError for a tokenizer whose
    tokens are no pieces of the text."""
    config: Any = context.config
    cross = config.cross_tokenizer
    student, other = (Reader(tokenizer_of(context, name)) for name in ("model", "teacher"))
    teacher = ReadingTeacher(frozen_scorer(context, "teacher", bf16=config.bf16))
    ends = student.end_token, other.end_token
    objective = cross_loss(
        teacher,
        cross,
        lambda: same_tokens(student.bytes, other.bytes, ends),
        beta=config.beta,
        temperature=config.temperature,
    )

    def seen(row: Row) -> Row:
        if "privileged_context" not in row:
            return row
        return {**row, "prompt": teacher_prompt(row, config.teacher_prompt_template)}

    def rows_of(trainer: Trainer, tokenizer: Any) -> CrossRows:
        scorer, context_length = trainer.scorer, teacher.scorer.context_length
        limits = Limits(
            RowLimit.of(config.max_length, scorer.context_length),
            room_for_prompts(config, scorer.context_length) if config.lmbda > 0 else None,
            RowLimit.of(config.max_length, context_length),
            context_length,
        )
        ended = frozenset(end_token_ids(scorer.transformers_model, tokenizer))
        return CrossRows(tokenizer, student, other, limits, ended, cross.skip_eos, seen)

    return objective, teacher, rows_of
