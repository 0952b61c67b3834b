"""What all tokenization shares: prompts alone, prompt and completion together, and what is noted of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from artifacts.errors import DataError
from stages.data.chat import Encoder
from stages.data.chat_template import Arguments, Tools
from stages.data.ledger import RowLedger
from stages.data.tools import TEMPLATE_ARGUMENTS, TOOLS
from stages.data.truncation import RowLimit
from stages.data.types import ROW_ID, Dataset, Row

ROWS_PER_BLOCK = 256
UNKNOWN_TOKENS = "tokens unknown to the tokenizer"
BOUNDARY_MOVED = "prompt tokens that belong to the completion"
EMPTY_PROMPT = "filtered: empty prompt"


def require_type(dataset: Dataset, accepted: tuple[str, ...]) -> None:
    if dataset.type not in accepted:
        raise DataError(
            f"the dataset is of type {dataset.type}; this stage takes {' or '.join(accepted)}: normalize "
            f"the source to that type"
        )


def require_rows(items: list[Any], dataset: Dataset, ledger: RowLedger, max_length: int | None) -> list[Any]:
    """Raises DataError where none is left, and says which limit it was that `max_length` comes from."""
    if not items:
        remedy = max_length.remedy if isinstance(max_length, RowLimit) else RowLimit.remedy
        raise DataError(
            f"none of the {len(dataset)} rows is left after tokenization ({ledger.summary()}); {remedy}, or look at "
            "the rows"
        )
    return items


def encode_prompts(encoder: Encoder, dataset: Dataset, rows: Sequence[Row]) -> list[list[int]]:
    """Token ids of the prompts alone, as the model would see them before it answers."""
    prompts = [row["prompt"] for row in rows]
    if dataset.conversational:
        return encoder.conversations(prompts, row_ids(rows), tools_of(rows), arguments_of(rows), generation_prompt=True)
    return encoder.texts(prompts, end=False)


def encode_joined(encoder: Encoder, dataset: Dataset, rows: Sequence[Row], column: str) -> list[list[int]]:
    """Token ids of prompt and completion together."""
    joined = [row["prompt"] + row[column] for row in rows]
    if dataset.conversational:
        return encoder.conversations(joined, row_ids(rows), tools_of(rows), arguments_of(rows))
    return encoder.texts(joined, end=True)


def row_ids(rows: Sequence[Row]) -> list[str]:
    return [row[ROW_ID] for row in rows]


def tools_of(rows: Sequence[Row]) -> list[Tools]:
    """The schemas of each row's tools."""
    return [row.get(TOOLS) for row in rows]


def arguments_of(rows: Sequence[Row]) -> list[Arguments]:
    """What each row gives the chat template besides messages and tools."""
    return [row.get(TEMPLATE_ARGUMENTS) for row in rows]


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading tokens, or characters, that the two share."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def note_boundary(ledger: RowLedger, row: Row, prompt_ids: Sequence[int], boundary: int) -> None:
    moved = len(prompt_ids) - boundary
    if moved > 0:
        detail = "tokenizing the completion with the prompt changes the prompt's last tokens"
        ledger.change(BOUNDARY_MOVED, row[ROW_ID], detail, moved)


def note_unknown(ledger: RowLedger, row_id: str, encoder: Encoder, token_ids: Sequence[int]) -> None:
    unknown = encoder.unknown(token_ids)
    if unknown:
        ledger.change(UNKNOWN_TOKENS, row_id, f"{unknown} of {len(token_ids)} tokens", unknown)
