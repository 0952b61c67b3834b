"""Rewards of how long and how repetitive completions are, counted in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.rollouts.choices import MultipleChoice
from stages.rollouts.math_answers import Math
from stages.rollouts.reward_base import BuiltIn
from stages.rollouts.verdicts import ExactMatch, NumericMatch, Verdict

VERDICTS: dict[str, type[Verdict]] = {
    "math": Math,
    "exact_match": ExactMatch,
    "numeric_match": NumericMatch,
    "multiple_choice": MultipleChoice,
}


class CosineLength(Verdict):
    """Right answers earn more when short, wrong ones lose less when long, along a cosine (arXiv:2502.03373)."""

    max_len: int = Field(gt=0)
    """Tokens at which a completion counts as longest."""
    correct: Literal["math", "exact_match", "numeric_match", "multiple_choice"] = "math"
    """Which reward says what is right."""
    min_value_wrong: float = -1.0
    """Reward of the shortest wrong completion."""
    max_value_wrong: float = -0.5
    """Reward of the longest wrong completion."""
    min_value_correct: float = 0.5
    """Reward of the longest right completion."""
    max_value_correct: float = 1.0
    """Reward of the shortest right completion."""

    def prepare(self) -> None:
        VERDICTS[self.correct]().prepare()

    def needed_columns(self) -> Sequence[tuple[str, ...]]:
        """Those of the reward that says what is right."""
        return VERDICTS[self.correct](column=self.column).needed_columns()

    def score(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[float | Exception | None]:
        """shortest + (longest - shortest) * (1 - cos(pi min(1, n / max_len))) / 2 for n tokens, as TRL has it."""
        verdicts = VERDICTS[self.correct](column=self.column).score(completions=completions, **columns)
        return [
            self._scaled(verdict == 1.0, len(ids)) if isinstance(verdict, float) else verdict
            for verdict, ids in zip(verdicts, completion_ids, strict=True)
        ]

    def _scaled(self, right: bool, tokens: int) -> float:
        shortest, longest = (
            (self.max_value_correct, self.min_value_correct) if right else (self.min_value_wrong, self.max_value_wrong)
        )
        return longest + 0.5 * (shortest - longest) * (1.0 + math.cos(math.pi * min(tokens / self.max_len, 1.0)))


class RepetitionPenalty(BuiltIn):
    """max_penalty times the share of token n-grams that were there before (arXiv:2502.03373)."""

    ngram_size: int = Field(3, gt=0)
    """Tokens of an n-gram."""
    max_penalty: float = Field(-1.0, le=0)
    """Reward of a completion that only repeats itself."""

    def score(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """0 for completions shorter than one n-gram."""
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: Sequence[int]) -> float:
        total = len(ids) - self.ngram_size + 1
        if total <= 0:
            return 0.0
        different = {tuple(ids[start : start + self.ngram_size]) for start in range(total)}
        return self.max_penalty * (1 - len(different) / total) if len(different) < total else 0.0


class SoftOverlong(BuiltIn):
    """0 up to max_completion_len - soft_punish_cache tokens, then falling to -1 (DAPO, arXiv:2503.14476, eq. 13)."""

    max_completion_len: int = Field(gt=0)
    """Tokens from which on the reward is -1."""
    soft_punish_cache: int = Field(ge=0)
    """Tokens over which it falls."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.soft_punish_cache > self.max_completion_len:
            raise ValueError(
                f"soft_punish_cache {self.soft_punish_cache} is more than max_completion_len {self.max_completion_len}"
            )
        return self

    def score(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, tokens: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if tokens <= free:
            return 0.0
        return -1.0 if tokens > self.max_completion_len else (free - tokens) / self.soft_punish_cache
