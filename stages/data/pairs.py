"""Preference rows as token ids: chosen and rejected after one shared prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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
from stages.data.given_tokens import given_pair
from stages.data.ledger import RowLedger
from stages.data.truncation import RowLimit, TruncationMode, fitted
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
    truncation_mode: TruncationMode = "keep_start",
) -> list[TokenizedPair]:
    """Rows of a paired type; prompt and completion together are cut to `max_length` tokens.

    truncation_mode keep_end cuts the start of the prompt, by so much that the longest completion fits, and no
    completion: all of a row answer the same prompt (TRL cuts each by its own length).
    """
    require_type(dataset, PAIRED)
    encoder = Encoder(tokenizer)
    pairs = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        for row, (prompt, encoded) in zip(rows, _encoded(encoder, dataset, rows), strict=True):
            pair = _pair(row, prompt, encoded, (max_length, truncation_mode), ledger)
            if pair is not None:
                everything = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.gold_ids or ())
                note_unknown(ledger, pair.row_id, encoder, [token for ids in everything for token in ids])
                pairs.append(pair)
    return require_rows(pairs, dataset, ledger, max_length)


class PairLimits(Protocol):
    """The configuration of a stage that learns from pairs; `max_length` is in tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def truncation_mode(self) -> TruncationMode: ...


def pairs_of(
    config: PairLimits, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, context_length: int, ledger: RowLedger
) -> list[TokenizedPair]:
    """As the stages that learn from pairs tokenize them, within the model's context."""
    longest = RowLimit.of(config.max_length, context_length)
    mode = config.truncation_mode
    return tokenize_pairs(dataset, tokenizer, max_length=longest, ledger=ledger, truncation_mode=mode)


def _encoded(encoder: Encoder, dataset: Dataset, rows: Sequence[Row]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt alone, prompt with each of the completions) of every row."""
    if dataset.type == "pretokenized_preference":
        return [given_pair(row) for row in rows]
    columns = TEXT_COLUMNS[dataset.type][1:]
    prompts = encode_prompts(encoder, dataset, rows)
    completions = [encode_joined(encoder, dataset, rows, column) for column in columns]
    return [(prompt, encoded) for prompt, *encoded in zip(prompts, *completions, strict=True)]


def _pair(
    row: Row,
    prompt: list[int],
    encoded: Sequence[list[int]],
    limit: tuple[int | None, TruncationMode],
    ledger: RowLedger,
) -> TokenizedPair | None:
    """`encoded`: prompt with chosen, with rejected, and with the gold completion of triple preferences."""
    row_id, (chosen, rejected, *_) = row[ROW_ID], encoded
    # each completion keeps a token even where one conversation is a prefix of the other
    shared = min(min(common_prefix(prompt, whole), len(whole) - 1) for whole in encoded)
    tokens = shared + sum(len(whole) - shared for whole in encoded)
    if chosen == rejected:
        ledger.drop(row_id, EQUAL_PAIR, tokens=tokens)
        return None
    if shared <= 0:
        ledger.drop(row_id, EMPTY_PROMPT, tokens=tokens)
        return None
    fault, detail, prompt_ids, completions = fitted(row_id, encoded, shared, *limit)
    if not fault and completions[0] == completions[1]:
        fault, detail = EQUAL_PAIR_CUT, f"max_length is {limit[0]}"
    if fault:
        ledger.drop(row_id, fault, detail, tokens=tokens)
        return None
    kept = len(prompt_ids) + sum(map(len, completions))
    if kept < tokens:
        ledger.truncate(row_id, tokens - kept, kept=kept)
    else:
        ledger.use(row_id, tokens=tokens)
    note_boundary(ledger, row, prompt, shared)
    margin = row.get("margin")
    chosen_ids, rejected_ids, *gold = completions
    return TokenizedPair(
        row_id,
        prompt_ids,
        chosen_ids,
        rejected_ids,
        None if margin is None else float(margin),
        gold[0] if gold else None,
    )
