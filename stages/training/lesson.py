"""What a completion is taught by: the prompt of a teacher who knows more, and where that comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

TOLD = "self_distillation"
REPROMPTED = f"{TOLD}/reprompt_sample_fraction"
"""Share of completions that are taught."""
SUCCESSFUL = f"{TOLD}/success_group_fraction"
"""Share of groups with a successful completion."""
TOO_LONG = f"{TOLD}/too_long_fraction"
"""Share of completions that are not taught because the teacher's prompt would be too long."""

PROMPT = "teacher_prompt_ids"
"""Column of records with the teacher's prompt, which may be long: samples to look at are without it."""
RECORD_TYPES: dict[str, Any] = {"taught_by": "string", "feedback": "string", PROMPT: ("list", "int")}
"""Columns of the records of completions that may be taught."""


@dataclass(frozen=True)
class Lesson:
    """Of one completion."""

    is_success: bool
    """Its own reward is enough."""
    solution: int | None = None
    """Which completion of the group the teacher is shown, counted from 0."""
    known_feedback: str | None = None
    """What was said of it; None: nothing."""
    feedback: str | None = None
    """What of that the teacher is shown."""
    teacher_ids: list[int] = field(default_factory=list)
    """The teacher's prompt; empty: there is nothing to teach, or it would be too long."""

    @property
    def is_too_long(self) -> bool:
        """Whether there is something to teach that does not fit."""
        return not self.teacher_ids and (self.solution is not None or self.feedback is not None)

    def record(self, siblings: Sequence[str]) -> dict[str, Any]:
        """Columns of its record. `siblings`: the row ids of the group's completions."""
        taught_by = None if self.solution is None else siblings[self.solution]
        return {"taught_by": taught_by, "feedback": self.feedback, PROMPT: self.teacher_ids}


def lesson_metrics(groups: Sequence[Sequence[Lesson]]) -> dict[str, float]:
    """Of a generation, under TRL's names; those that it has not: the share that did not fit, and the mean length of the
    teacher's prompts."""
    lessons = [lesson for group in groups for lesson in group]
    if not lessons:
        return {}
    lengths = [len(lesson.teacher_ids) for lesson in lessons if lesson.teacher_ids]
    found = {
        SUCCESSFUL: fmean(any(lesson.is_success for lesson in group) for group in groups),
        f"{TOLD}/success_sample_fraction": fmean(lesson.solution is not None for lesson in lessons),
        f"{TOLD}/feedback_available_fraction": fmean(lesson.known_feedback is not None for lesson in lessons),
        f"{TOLD}/feedback_used_fraction": fmean(lesson.feedback is not None for lesson in lessons),
        REPROMPTED: len(lengths) / len(lessons),
        TOO_LONG: fmean(lesson.is_too_long for lesson in lessons),
    }
    return found | ({f"{TOLD}/reprompt_mean_length": fmean(lengths)} if lengths else {})
