"""Preference rows as token ids: chosen and rejected after one shared prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.data.chat import Encoder
from stages.data.encode import (
    EMPTY_PROMPT,
    PROMPT_TOO_LONG,
    ROWS_PER_BLOCK,
    common_prefix,
    encode_joined,
    encode_prompts,
    note_boundary,
    note_unknown,
    require_rows,
    require_type,
)
from stages.data.given_tokens import given_pair
from stages.data.ledger import RowLedger
from stages.data.types import PAIRED, ROW_ID, TEXT_COLUMNS, Dataset, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUAL_PAIR = "filtered: chosen equals rejected"
EQUAL_PAIR_CUT = "filtered: chosen equals rejected after truncation"


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """`prompt_ids + chosen_ids` is the tokenization of prompt and chosen together; so for rejected.

    `prompt_ids`: the longest token prefix that these two share with the prompt alone; never empty.
    """

    row_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None
    gold_ids: list[int] | None = None
    """Of triple preferences, whose column `reference` it is."""


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    ledger: RowLedger,
    vocabulary: int | None = None,
) -> list[TokenizedPair]:
    """Rows of a paired type; prompt and completion together are cut to `max_length` tokens.

    vocabulary: number of token ids that the model has, for pretokenized rows; None: as many as the tokenizer.
    """
    require_type(dataset, PAIRED)
    encoder = Encoder(tokenizer)
    size = len(tokenizer) if vocabulary is None else vocabulary
    pairs = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        for row, (prompt, encoded) in zip(rows, _encoded(encoder, dataset, rows, size), strict=True):
            pair = _pair(row, prompt, encoded, max_length, encoder, ledger)
            if pair is not None:
                pairs.append(pair)
    return require_rows(pairs, dataset, ledger)


def _encoded(
    encoder: Encoder, dataset: Dataset, rows: Sequence[Row], vocabulary: int
) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt alone, prompt with each of the completions) of every row."""
    if dataset.type == "pretokenized_preference":
        return [given_pair(row, vocabulary) for row in rows]
    columns = TEXT_COLUMNS[dataset.type][1:]
    prompts = encode_prompts(encoder, dataset, rows)
    completions = [encode_joined(encoder, dataset, rows, column) for column in columns]
    return [(prompt, encoded) for prompt, *encoded in zip(prompts, *completions, strict=True)]


def _pair(
    row: Row,
    prompt: list[int],
    encoded: Sequence[list[int]],
    max_length: int | None,
    encoder: Encoder,
    ledger: RowLedger,
) -> TokenizedPair | None:
    """`encoded`: prompt with chosen, with rejected, and with the gold completion of triple preferences."""
    row_id, (chosen, rejected, *_) = row[ROW_ID], encoded
    if chosen == rejected:
        ledger.drop(row_id, EQUAL_PAIR)
        return None
    # each completion keeps a token even where one conversation is a prefix of the other
    shared = min(min(common_prefix(prompt, whole), len(whole) - 1) for whole in encoded)
    room = None if max_length is None else max_length - shared
    if shared <= 0:
        ledger.drop(row_id, EMPTY_PROMPT)
        return None
    if room is not None and room <= 0:
        ledger.drop(row_id, PROMPT_TOO_LONG, f"{shared} tokens, max_length is {max_length}")
        return None
    completions = [whole[shared:][:room] for whole in encoded]
    if completions[0] == completions[1]:
        ledger.drop(row_id, EQUAL_PAIR_CUT, f"max_length is {max_length}")
        return None
    cut = sum(len(whole) - shared - len(kept) for whole, kept in zip(encoded, completions, strict=True))
    if cut:
        ledger.truncate(row_id, cut)
    else:
        ledger.use(row_id)
    note_boundary(ledger, row, prompt, shared)
    note_unknown(ledger, row_id, encoder, [*prompt[:shared], *(token for ids in completions for token in ids)])
    margin = row.get("margin")
    chosen_ids, rejected_ids, *gold = completions
    return TokenizedPair(
        row_id,
        prompt[:shared],
        chosen_ids,
        rejected_ids,
        None if margin is None else float(margin),
        gold[0] if gold else None,
    )
