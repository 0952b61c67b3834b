"""Built-in rewards: 1 for a right completion, 0 for a wrong one, None where the row has nothing to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.errors import DataError
from stages.rollouts.numbers import final_number

REFERENCE_COLUMNS = ("answer", "completion", "messages")
"""Where the right answer stands: the first of these columns that the dataset has."""


def exact_match(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """The completion is the reference, but for white space around it."""
    pairs = zip(completions, _references(columns), strict=True)
    return [None if reference is None else float(text_of(made) == reference) for made, reference in pairs]


def numeric_match(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """The completion's final number has exactly the value of the reference's; see `final_number`.

    A reference without a number gives None, a completion without one 0.
    """
    verdicts: list[float | None] = []
    for made, reference in zip(completions, _references(columns), strict=True):
        expected = None if reference is None else final_number(reference)
        verdicts.append(None if expected is None else float(final_number(text_of(made)) == expected))
    return verdicts


def text_of(value: Any) -> str:
    """The text of a completion or reference, without white space around it; of messages, the last one's."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[-1]["content"] if value else ""
    return str(value).strip()


def _references(columns: Mapping[str, Sequence[Any]]) -> list[str | None]:
    for column in REFERENCE_COLUMNS:
        if column in columns:
            return [None if value is None else text_of(value) for value in columns[column]]
    found = sorted(set(columns) - {"prompts", "completion_ids"})
    raise DataError(
        f"exact_match and numeric_match compare with column {' or '.join(REFERENCE_COLUMNS)}; the dataset has "
        f"{', '.join(found) or 'no further columns'}; keep one of them in normalize, or give a function"
    )
