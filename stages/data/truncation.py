"""What is done with rows of more tokens than fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from artifacts.errors import DataError

TruncationMode = Literal["keep_start", "keep_end", "drop", "error"]
"""keep_start: the first max_length tokens stay (TRL's default); keep_end: the last; drop: the row is left out and
counted; error: the stage stops."""

TOO_LONG = "filtered: longer than max_length"
PROMPT_TOO_LONG = "filtered: prompt too long"
COMPLETION_TOO_LONG = "filtered: completion too long"


class RowLimit(int):
    """The most tokens that a row may have: max_length, or what the model's context leaves where that is less.
    `remedy`: what to do where it is too few."""

    remedy = "raise max_length"

    @classmethod
    def of(cls, max_length: int, context_length: int, max_completion_length: int = 0) -> RowLimit:
        """Of a prompt where `max_completion_length` tokens are to follow it, of a whole row where none are."""
        room = context_length - max_completion_length
        limit = cls(min(max_length, room))
        if room <= max_length:
            least = f"the model's context of {context_length} tokens is the limit"
            limit.remedy = f"{least} (max_length is {max_length}): take a model with a longer one"
            if max_completion_length:
                limit.remedy = f"{least}, and leaves {room} to a prompt: lower max_completion_length"
        return limit


def kept_part(row_id: str, length: int, max_length: int | None, mode: TruncationMode) -> slice | None:
    """The tokens of a row that stay; None: the row is dropped. Raises DataError where the mode is error."""
    if max_length is None or length <= max_length:
        return slice(0, length)
    if mode == "error":
        raise DataError(
            f"row {row_id}: {length} tokens, and at most {max_length} fit; raise max_length (as far as the model's "
            f"context goes), or set truncation_mode to keep_start, keep_end or drop"
        )
    if mode == "drop":
        return None
    return slice(0, max_length) if mode == "keep_start" else slice(length - max_length, length)


def fitted(
    row_id: str, encoded: Sequence[list[int]], shared: int, max_length: int | None, mode: TruncationMode
) -> tuple[str, str, list[int], list[list[int]]]:
    """(why the row cannot be used, or nothing; the numbers behind it; the prompt; its completions), as they fit.

    `encoded`: the prompt of `shared` tokens with each of its completions. Cut from the end, completions lose tokens,
    the prompt never; cut from the start, the prompt alone does, by as much as the longest completion asks for.
    """
    prompt, completions = encoded[0][:shared], [whole[shared:] for whole in encoded]
    longest = max(map(len, encoded))
    part = kept_part(row_id, longest, max_length, mode)
    if part is None:
        return TOO_LONG, f"{longest} tokens, max_length is {max_length}", prompt, completions
    if part.start >= shared:
        return COMPLETION_TOO_LONG, f"{longest - shared} tokens, max_length is {max_length}", prompt, completions
    if part.stop <= shared:
        return PROMPT_TOO_LONG, f"{shared} tokens, max_length is {max_length}", prompt, completions
    return "", "", prompt[part.start :], [ids[: part.stop - shared] for ids in completions]
