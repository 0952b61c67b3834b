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
from stages.data.ledger import RowLedger
from stages.data.types import ROW_ID, Dataset, Row

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


def tokenize_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, ledger: RowLedger
) -> list[TokenizedPair]:
    """Preference rows; prompt and completion together are cut to `max_length` tokens."""
    require_type(dataset, ("preference",))
    encoder = Encoder(tokenizer)
    pairs = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        prompts = encode_prompts(encoder, dataset, rows)
        chosen = encode_joined(encoder, dataset, rows, "chosen")
        rejected = encode_joined(encoder, dataset, rows, "rejected")
        for row, *encoded in zip(rows, prompts, chosen, rejected, strict=True):
            pair = _pair(row, encoded, max_length, encoder, ledger)
            if pair is not None:
                pairs.append(pair)
    return require_rows(pairs, dataset, ledger)


def _pair(
    row: Row, encoded: Sequence[list[int]], max_length: int | None, encoder: Encoder, ledger: RowLedger
) -> TokenizedPair | None:
    prompt, chosen, rejected = encoded
    row_id = row[ROW_ID]
    if chosen == rejected:
        ledger.drop(row_id, EQUAL_PAIR)
        return None
    # each completion keeps a token even where one conversation is a prefix of the other
    shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected), len(chosen) - 1, len(rejected) - 1)
    room = None if max_length is None else max_length - shared
    if shared <= 0:
        ledger.drop(row_id, EMPTY_PROMPT)
        return None
    if room is not None and room <= 0:
        ledger.drop(row_id, PROMPT_TOO_LONG, f"{shared} tokens, max_length is {max_length}")
        return None
    chosen_ids, rejected_ids = chosen[shared:][:room], rejected[shared:][:room]
    if chosen_ids == rejected_ids:
        ledger.drop(row_id, EQUAL_PAIR_CUT, f"max_length is {max_length}")
        return None
    cut = len(chosen) + len(rejected) - 2 * shared - len(chosen_ids) - len(rejected_ids)
    if cut:
        ledger.truncate(row_id, cut)
    else:
        ledger.use(row_id)
    note_boundary(ledger, row, prompt, shared)
    note_unknown(ledger, row_id, encoder, [*prompt[:shared], *chosen_ids, *rejected_ids])
    margin = row.get("margin")
    return TokenizedPair(row_id, prompt[:shared], chosen_ids, rejected_ids, None if margin is None else float(margin))
