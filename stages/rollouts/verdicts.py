"""Rewards that compare with the right answer: 1, 0, or None where the row has nothing to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.errors import DataError
from stages.rollouts.numbers import final_number
from stages.rollouts.reward_base import BuiltIn, text_of

REFERENCE_COLUMNS = ("answer", "completion", "messages", "solution")
"""Where the right answer stands: the first of these columns that the dataset has."""


class Verdict(BuiltIn):
    """A reward that knows the right answer."""

    column: str | None = None
    """Column with the right answer; null: the first of answer, completion, messages, solution that there is."""

    def needed_columns(self) -> Sequence[tuple[str, ...]]:
        """The right answer's."""
        return (REFERENCE_COLUMNS if self.column is None else (self.column,),)

    def references(self, columns: Mapping[str, Sequence[Any]]) -> list[str | None]:
        """The right answers as text. Raises DataError when the dataset has none."""
        for column in REFERENCE_COLUMNS if self.column is None else (self.column,):
            if column in columns:
                return [None if value is None else text_of(value) for value in columns[column]]
        found = sorted(set(columns) - {"prompts", "completion_ids"})
        raise DataError(
            f"a reward compares with column {self.column or ' or '.join(REFERENCE_COLUMNS)}; the dataset has "
            f"{', '.join(found) or 'no further columns'}; keep one of them in normalize, or give a function"
        )


class ExactMatch(Verdict):
    """1 where the completion is the right answer, but for white space around it."""

    def score(self, completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        pairs = zip(completions, self.references(columns), strict=True)
        return [None if reference is None else float(text_of(made) == reference) for made, reference in pairs]


class NumericMatch(Verdict):
    """1 where the completion's final number has exactly the value of the right answer's."""

    def score(self, completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        """A reference without a number gives None, a completion without one 0; see `final_number`."""
        verdicts: list[float | None] = []
        for made, reference in zip(completions, self.references(columns), strict=True):
            expected = None if reference is None else final_number(reference)
            verdicts.append(None if expected is None else float(final_number(text_of(made)) == expected))
        return verdicts
