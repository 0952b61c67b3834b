"""Typed rows as token ids: sequences with a loss mask, and prompts to answer (pairs: `pairs.py`).

Every function records each row's state in the ledger, and raises DataError when no row is left.
Padding plays no part here, so a tokenizer whose pad token is its end token trains its end token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.chat import Encoder
from stages.data.encode import (
    EMPTY_PROMPT,
    ROWS_PER_BLOCK,
    arguments_of,
    common_prefix,
    encode_joined,
    encode_prompts,
    note_boundary,
    note_unknown,
    require_rows,
    require_type,
    row_ids,
    tools_of,
)
from stages.data.given_tokens import given_sequence, require_masks
from stages.data.ledger import RowLedger
from stages.data.truncation import PROMPT_TOO_LONG, TOO_LONG, TruncationMode, kept_part
from stages.data.types import PROMPT_TYPES, ROW_ID, SEQUENCE_TYPES, Dataset, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = "masked"


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """`loss_mask[t]`: token t is trained. `loss_mask[0]` is False: nothing predicts the first token."""

    row_id: str
    token_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """The prompt up to where the model goes on. `row`: all columns, for rewards, with `prompt` among them."""

    row_id: str
    prompt_ids: list[int]
    row: Row
    teacher_ids: list[int] | None = None
    """The prompt as a teacher sees it, where that is more (`privileged.py`)."""


def tokenize_sequences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    ledger: RowLedger,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> list[TokenizedSequence]:
    """Language-modelling, prompt-completion and pretokenized rows, of at most `max_length` tokens.

    completion_only_loss None: the prompt of a prompt-completion row is not trained (TRL's default).
    assistant_only_loss: of conversations, only what the template marks as the assistant's is trained.
    """
    require_type(dataset, SEQUENCE_TYPES)
    _check_masks(dataset, assistant_only_loss, completion_only_loss)
    encoder = Encoder(tokenizer)
    completion_only = dataset.type == "prompt_completion" and completion_only_loss is not False
    sequences = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        if dataset.type == "pretokenized":
            masked = [given_sequence(row, assistant_only_loss, completion_only_loss) for row in rows]
        else:
            masked = list(_full_sequences(encoder, dataset, rows, assistant_only_loss))
        prompts = encode_prompts(encoder, dataset, rows) if completion_only else [[]] * len(rows)
        for row, (token_ids, mask), prompt_ids in zip(rows, masked, prompts, strict=True):
            boundary = common_prefix(prompt_ids, token_ids)
            note_boundary(ledger, row, prompt_ids, boundary)
            mask = [trained and position >= max(boundary, 1) for position, trained in enumerate(mask)]
            sequence = _cut(TokenizedSequence(row[ROW_ID], token_ids, mask), max_length, truncation_mode, ledger)
            if sequence is not None:
                note_unknown(ledger, sequence.row_id, encoder, sequence.token_ids)
                sequences.append(sequence)
    return require_rows(sequences, dataset, ledger, max_length)


def _check_masks(dataset: Dataset, assistant_only: bool, completion_only: bool | None) -> None:
    """Raises DataError where the rows cannot say what is asked for."""
    if dataset.type == "pretokenized":
        require_masks(dataset, assistant_only, completion_only)
        return
    if completion_only and dataset.type == "language_modeling":
        raise DataError(
            "completion_only_loss: a language_modeling dataset has no prompt; leave it out, or normalize "
            "to prompt_completion"
        )
    if assistant_only and not dataset.conversational:
        raise DataError(
            "assistant_only_loss needs a conversational dataset, this one holds plain text; use "
            "completion_only_loss with prompt and completion"
        )


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    ledger: RowLedger,
    complete: Callable[[Row], Row] = lambda row: row,
) -> list[TokenizedPrompt]:
    """The prompts of any type that has one, and of conversations all but the last assistant turn.

    A prompt longer than `max_length` is dropped, never cut: an answer to half a question teaches nothing. `complete`
    gives rows what the stage adds to them, such as tools.
    """
    require_type(dataset, PROMPT_TYPES)
    if dataset.type == "language_modeling" and not dataset.conversational:
        raise DataError("a language_modeling dataset of plain text has no prompts; give one with a prompt column")
    encoder = Encoder(tokenizer)
    prompts = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        if dataset.type == "language_modeling":
            rows = [{**row, "prompt": row["messages"][:-1]} for row in rows]
        rows = list(map(complete, rows))
        for row, prompt_ids in zip(rows, encode_prompts(encoder, dataset, rows), strict=True):
            if usable_prompt(row, prompt_ids, max_length, ledger):
                note_unknown(ledger, row[ROW_ID], encoder, prompt_ids)
                ledger.use(row[ROW_ID], tokens=len(prompt_ids))
                prompts.append(TokenizedPrompt(row[ROW_ID], prompt_ids, row))
    return require_rows(prompts, dataset, ledger, max_length)


def usable_prompt(row: Row, prompt_ids: Sequence[int], max_length: int | None, ledger: RowLedger) -> bool:
    """Whether there is a prompt and it fits; else the row is dropped from the ledger."""
    if not prompt_ids:
        ledger.drop(row[ROW_ID], EMPTY_PROMPT, tokens=0)
    elif max_length is not None and len(prompt_ids) > max_length:
        detail = f"{len(prompt_ids)} tokens, max_length is {max_length}"
        ledger.drop(row[ROW_ID], PROMPT_TOO_LONG, detail, tokens=len(prompt_ids))
    else:
        return True
    return False


def _full_sequences(
    encoder: Encoder, dataset: Dataset, rows: Sequence[Row], assistant_only: bool
) -> Iterable[tuple[list[int], list[bool]]]:
    if assistant_only:
        messages = [_messages(dataset, row) for row in rows]
        return encoder.assistant_masks(messages, row_ids(rows), tools_of(rows), arguments_of(rows))
    if dataset.type == "prompt_completion":
        encoded = encode_joined(encoder, dataset, rows, "completion")
    elif dataset.conversational:
        messages = [row["messages"] for row in rows]
        encoded = encoder.conversations(messages, row_ids(rows), tools_of(rows), arguments_of(rows))
    else:
        encoded = encoder.texts([row["text"] for row in rows], end=True)
    return [(token_ids, [True] * len(token_ids)) for token_ids in encoded]


def _messages(dataset: Dataset, row: Row) -> list[Message]:
    if dataset.type == "language_modeling":
        return list(row["messages"])
    return [*row["prompt"], *row["completion"]]


def _cut(
    sequence: TokenizedSequence, max_length: int | None, mode: TruncationMode, ledger: RowLedger
) -> TokenizedSequence | None:
    """At most `max_length` tokens; None (and a state in the ledger) when none of them is trained, or by the mode."""
    length = len(sequence.token_ids)
    part = kept_part(sequence.row_id, length, max_length, mode)
    if part is None:
        ledger.drop(sequence.row_id, TOO_LONG, f"{length} tokens, max_length is {max_length}", tokens=length)
        return None
    token_ids, mask = sequence.token_ids[part], sequence.loss_mask[part]
    if part.start:  # nothing predicts the first token that is left
        mask[0] = False
    if not any(mask):
        which = "last" if part.start else "first"
        cause = (
            f"of {length} tokens the {which} {len(mask)} are kept" if any(sequence.loss_mask) else "nothing to train"
        )
        ledger.drop(sequence.row_id, MASKED, cause, tokens=length)
        return None
    if len(mask) < length:
        ledger.truncate(sequence.row_id, length - len(mask), kept=len(mask))
    else:
        ledger.use(sequence.row_id, tokens=length)
    return TokenizedSequence(sequence.row_id, token_ids, mask)
