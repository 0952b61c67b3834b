"""Rows that bring their token ids: what makes one valid, whatever tokenizer made it.

Names as TRL's. `labels` say which tokens are trained: -100 where not, elsewhere the token itself, not shifted.
`completion_mask` and `assistant_masks` have 1 or true where a token is the completion's or the assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.data.faults import EMPTY_TOKENS, EQUAL_PAIR, NO_SHARED_PROMPT, Dropped, RowError, require_columns, what_is
from stages.data.types import TOKEN_MASKS, Row

IGNORED = -100
"""The label of a token that is not trained, as PyTorch's cross-entropy has it."""


def shape_sequence(row: Row, where: str) -> Row:
    """A row of type pretokenized; masks become true or false, labels stay."""
    require_columns(row, ("input_ids",), where, "pretokenized")
    token_ids = _token_ids(row["input_ids"], where, "input_ids")
    shaped = {**row, "input_ids": token_ids}
    for column in TOKEN_MASKS:
        values = row.get(column)
        if values is None:
            shaped.pop(column, None)
            continue
        if not isinstance(values, list):
            raise RowError(where, column, "must be a list with a number a token", what_is(values))
        if len(values) != len(token_ids):
            found = f"{len(values)} for {len(token_ids)} tokens"
            raise RowError(where, column, "must be as long as input_ids", found)
        check = _labels if column == "labels" else _mask
        shaped[column] = check(values, token_ids, where, column)
    return shaped


def shape_preference(row: Row, where: str) -> Row:
    """A row of type pretokenized_preference; without prompt_ids, what both begin with is the prompt."""
    require_columns(row, ("chosen_ids", "rejected_ids"), where, "pretokenized_preference")
    chosen, rejected = (_token_ids(row[name], where, name) for name in ("chosen_ids", "rejected_ids"))
    if chosen == rejected:
        raise Dropped(EQUAL_PAIR, "rejected_ids")
    if row.get("prompt_ids") is not None:
        prompt = _token_ids(row["prompt_ids"], where, "prompt_ids")
        return {**row, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    shared = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)) - 1,  # each keeps a token where one begins with the other
    )
    if shared == 0:
        raise Dropped(NO_SHARED_PROMPT, "chosen_ids, rejected_ids")
    return {**row, "prompt_ids": chosen[:shared], "chosen_ids": chosen[shared:], "rejected_ids": rejected[shared:]}


def require_equal_columns(row: Row, before: Sequence[str], where: str) -> None:
    """Raises RowError where a row has other masks than the rows before it: none would not mean all or nothing."""
    for column in TOKEN_MASKS:
        if (column in row) != (column in before):
            has, had = ("a", "no") if column in row else ("no", "a")
            reason = f"{has} {column!r}, and the rows before it have {had if had == 'no' else 'one'}"
            raise RowError(where, column, reason, do="give it to every row of the dataset, or to none")


def _token_ids(values: Any, where: str, column: str) -> list[int]:
    if not isinstance(values, list):
        raise RowError(where, column, "must be a list of token ids", what_is(values))
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RowError(where, f"{column}[{number}]", "a token id is a whole number of at least 0", repr(value))
    if not values:
        raise Dropped(EMPTY_TOKENS, column)
    return values


def _labels(values: list[Any], token_ids: list[int], where: str, column: str) -> list[int]:
    for number, (value, token) in enumerate(zip(values, token_ids, strict=True)):
        if isinstance(value, bool) or value not in (IGNORED, token):
            reason = f"a label is {IGNORED} (not trained) or the token itself, not the one after it"
            raise RowError(where, f"{column}[{number}]", reason, f"{value!r} for token {token}")
    return values


def _mask(values: list[Any], token_ids: list[int], where: str, column: str) -> list[bool]:
    for number, value in enumerate(values):
        if value not in (0, 1):
            raise RowError(where, f"{column}[{number}]", "a mask holds 0 and 1, or false and true", repr(value))
    return [bool(value) for value in values]
