"""Judged completions as token ids, and for each of them the completion of another prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.data.chat import Encoder
from stages.data.encode import (
    EMPTY_PROMPT,
    ROWS_PER_BLOCK,
    common_prefix,
    encode_joined,
    encode_prompts,
    note_boundary,
    note_unknown,
    require_rows,
    require_type,
)
from stages.data.ledger import RowLedger
from stages.data.pairs import tokenize_pairs
from stages.data.truncation import TruncationMode, fitted
from stages.data.types import PAIRED, ROW_ID, Dataset, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedCompletion:
    """`prompt_ids + completion_ids` is the tokenization of both together. `label`: the completion is desirable."""

    row_id: str
    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool


def tokenize_unpaired(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    ledger: RowLedger,
    truncation_mode: TruncationMode = "keep_start",
) -> list[TokenizedCompletion]:
    """Rows of type unpaired_preference, or pairs as a desirable and an undesirable completion each.

    Prompt and completion together are cut to `max_length` tokens; truncation_mode keep_end cuts the start of the prompt
    alone. Raises DataError where no row is left.
    """
    require_type(dataset, ("unpaired_preference", *PAIRED))
    if dataset.type in PAIRED:
        return [
            TokenizedCompletion(f"{pair.row_id}/{side}", pair.prompt_ids, ids, side == "chosen")
            for pair in tokenize_pairs(
                dataset,
                tokenizer,
                max_length=max_length,
                ledger=ledger,
                truncation_mode=truncation_mode,
            )
            for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
        ]
    encoder = Encoder(tokenizer)
    found = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        prompts = encode_prompts(encoder, dataset, rows)
        joined = encode_joined(encoder, dataset, rows, "completion")
        for row, prompt, whole in zip(rows, prompts, joined, strict=True):
            one = _completion(row, prompt, whole, (max_length, truncation_mode), ledger)
            if one is not None:
                note_unknown(ledger, one.row_id, encoder, [*one.prompt_ids, *one.completion_ids])
                found.append(one)
    return require_rows(found, dataset, ledger, max_length)


def _completion(
    row: Row,
    prompt: list[int],
    whole: list[int],
    limit: tuple[int | None, TruncationMode],
    ledger: RowLedger,
) -> TokenizedCompletion | None:
    row_id, tokens = row[ROW_ID], len(whole)
    boundary = min(common_prefix(prompt, whole), tokens - 1)
    if boundary <= 0:
        ledger.drop(row_id, EMPTY_PROMPT, tokens=tokens)
        return None
    fault, detail, prompt_ids, (completion_ids,) = fitted(row_id, [whole], boundary, *limit)
    if fault:
        ledger.drop(row_id, fault, detail, tokens=tokens)
        return None
    kept = len(prompt_ids) + len(completion_ids)
    if kept < tokens:
        ledger.truncate(row_id, tokens - kept, kept=kept)
    else:
        ledger.use(row_id, tokens=tokens)
    note_boundary(ledger, row, prompt, boundary)
    return TokenizedCompletion(row_id, prompt_ids, completion_ids, bool(row["label"]))


def mismatched(rows: Sequence[TokenizedCompletion], max_length: int) -> list[list[int]] | None:
    """For every row a completion that answers another prompt, cut so that it fits behind the row's own.

    Rows stand in a circle in the order of their ids' digests, and each takes the completion of the next one with
    another prompt: a choice that knows neither the order of the rows nor batches. None where all prompts are equal.
    """
    circle = sorted(range(len(rows)), key=lambda index: hashlib.sha256(rows[index].row_id.encode()).digest())
    prompts = [rows[index].prompt_ids for index in circle]
    size = len(circle)
    partner: dict[int, int] = {}
    following: int | None = None
    for place in reversed(range(2 * size)):  # once around to find what follows the last, once to note it
        here, after = place % size, (place + 1) % size
        if prompts[here] != prompts[after]:
            following = after
        if following is None:
            continue
        partner[circle[here]] = circle[following]
    if not partner:
        return None
    return [_behind(rows[partner[index]], row, max_length) for index, row in enumerate(rows)]


def _behind(other: TokenizedCompletion, row: TokenizedCompletion, max_length: int) -> list[int]:
    """The other's completion as far as it fits behind the row's prompt, which leaves room for a token at least."""
    return other.completion_ids[: max_length - len(row.prompt_ids)]
