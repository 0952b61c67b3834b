"""Stepwise supervision as token ids: a prompt, then steps that each end with a separator where they are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.chat import Encoder
from stages.data.encode import EMPTY_PROMPT, ROWS_PER_BLOCK, note_unknown, require_rows, require_type
from stages.data.ledger import RowLedger
from stages.data.truncation import PROMPT_TOO_LONG
from stages.data.types import ROW_ID, Dataset, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedSteps:
    """`ends[i]`: index of the last token of step i's separator; `labels[i]`: whether the step is right."""

    row_id: str
    token_ids: list[int]
    ends: list[int]
    labels: list[bool]


def tokenize_steps(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step_separator: str,
    max_length: int | None,
    last_step_only: bool,
    ledger: RowLedger,
) -> list[TokenizedSteps]:
    """Rows of type stepwise_supervision; steps that do not end within `max_length` tokens are cut off and counted.

    Prompt, steps and separators are tokenized one by one, as a model that writes step after step sees them. Raises
    DataError where the separator has no tokens or no row is left.
    """
    require_type(dataset, ("stepwise_supervision",))
    encoder = Encoder(tokenizer)
    (separator,) = encoder.pieces([step_separator])
    if not separator:
        raise DataError(f"step_separator {step_separator!r} has no tokens; give one that the tokenizer can write")
    found = []
    for rows in dataset.blocks(ROWS_PER_BLOCK):
        prompts = encoder.texts([row["prompt"] for row in rows], end=False)
        for row, prompt in zip(rows, prompts, strict=True):
            steps = _join(row, prompt, encoder.pieces(row["completions"]), separator)
            if last_step_only:  # of a row that is cut, it is gone
                steps = _last(steps)
            kept = _cut(steps, len(prompt), max_length, ledger)
            if kept is not None:
                note_unknown(ledger, kept.row_id, encoder, kept.token_ids)
                found.append(kept)
    return require_rows(found, dataset, ledger, max_length)


def _join(row: Row, prompt: list[int], steps: list[list[int]], separator: list[int]) -> TokenizedSteps:
    token_ids, ends = list(prompt), []
    for step in steps:
        token_ids += [*step, *separator]
        ends.append(len(token_ids) - 1)
    return TokenizedSteps(row[ROW_ID], token_ids, ends, list(row["labels"]))


def _cut(steps: TokenizedSteps, prompt: int, max_length: int | None, ledger: RowLedger) -> TokenizedSteps | None:
    """The steps that end within the first `max_length` tokens."""
    tokens = len(steps.token_ids)
    longest = tokens if max_length is None else max_length
    if not prompt:
        ledger.drop(steps.row_id, EMPTY_PROMPT, tokens=tokens)
        return None
    kept = sum(end < longest for end in steps.ends)
    if not kept:
        detail = f"no step ends within max_length {max_length}"
        ledger.drop(steps.row_id, PROMPT_TOO_LONG, detail, tokens=tokens)
        return None
    if kept == len(steps.ends):
        ledger.use(steps.row_id, tokens=tokens)
        return steps
    token_ids = steps.token_ids[: steps.ends[kept - 1] + 1]
    ledger.truncate(steps.row_id, tokens - len(token_ids), kept=len(token_ids))
    return TokenizedSteps(steps.row_id, token_ids, steps.ends[:kept], steps.labels[:kept])


def _last(steps: TokenizedSteps) -> TokenizedSteps:
    return TokenizedSteps(steps.row_id, steps.token_ids, steps.ends[-1:], steps.labels[-1:])
