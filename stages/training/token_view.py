"""Rows of a stage as its model will read them, token by token, and which of them are learned.

The rows go through the function that the stage itself tokenizes by, with its settings and its model's tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from artifacts.errors import DataError, RequestError
from stages.adapters import model_source
from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.token_parts import Part, TokenizedRow, parts_of
from stages.data.types import ROW_ID, Dataset
from stages.training.start import tokenizer_of
from stages.training.trunk import context_of


@dataclass(frozen=True)
class Wanted:
    """Which rows: those whose id begins with `row`, or the first `limit`, of input `dataset` or another one."""

    input: str = "dataset"
    row: str | None = None
    limit: int = 3


@dataclass(frozen=True)
class Span:
    """Tokens in a row that are all learned, or all not."""

    token_ids: tuple[int, ...]
    text: str
    learned: bool


@dataclass(frozen=True)
class ReadRow:
    """A row as it is read; `state` is what the ledger will say of it, and without parts it is not used."""

    row_id: str
    state: str
    parts: tuple[tuple[str, tuple[Span, ...]], ...] = ()

    def count(self, *, learned: bool | None = None) -> int:
        """Tokens of all parts, or those that are learned (not learned)."""
        spans = (span for _, spans in self.parts for span in spans)
        return sum(len(span.token_ids) for span in spans if learned is None or span.learned is learned)

    def to_json(self) -> dict[str, Any]:
        parts = [
            {
                "part": name,
                "token_ids": [token for span in spans for token in span.token_ids],
                "learned": [span.learned for span in spans for _ in span.token_ids],
                "spans": [{"text": span.text, "learned": span.learned} for span in spans],
            }
            for name, spans in self.parts
        ]
        return {
            "row_id": self.row_id,
            "state": self.state,
            "tokens": self.count(),
            "learned_tokens": self.count(learned=True),
            "parts": parts,
        }


@dataclass(frozen=True)
class Reading:
    """The rows that were asked for, of so many."""

    stage: str
    input: str
    type: str
    total: int
    rows: tuple[ReadRow, ...]
    pieces: Mapping[int, str]
    """Token id -> the text of that token alone, of all that occur."""

    def to_json(self) -> dict[str, Any]:
        """For `posttrain tokens --json`."""
        rows = [row.to_json() for row in self.rows]
        return {"stage": self.stage, "input": self.input, "type": self.type, "total": self.total, "rows": rows}


def seen_rows(context: Context, wanted: Wanted) -> Reading:
    """Of a context with inputs `model` and `dataset`, whose stage learns from given rows. Raises RequestError for a row
    that does not exist, and for one that would make the stage fail."""
    stage = context.stage
    assert stage.tokenized is not None
    tokenizer = tokenizer_of(context, "model")
    length = context_of(AutoConfig.from_pretrained(model_source(context, "model").folder, local_files_only=True))
    dataset = read_dataset(context.input("dataset"))
    rows = []
    for index in _indices(dataset, wanted):
        ledger = RowLedger()
        try:
            found = stage.tokenized(context.config, dataset.select([index]), tokenizer, length, ledger)
        except DataError as error:
            found = []
            if not ledger.states:  # the row itself is wrong; else it is merely not used, and no row is left
                raise RequestError(f"stage {context.spec.name} would fail: {error}") from error
        rows.append(_row(str(dataset[index][ROW_ID]), found, ledger, tokenizer))
    ids = {token for row in rows for _, spans in row.parts for span in spans for token in span.token_ids}
    pieces = {token: tokenizer.decode([token]) for token in sorted(ids)}
    return Reading(context.spec.name, wanted.input, dataset.type, len(dataset), tuple(rows), pieces)


def _indices(dataset: Dataset, wanted: Wanted) -> Sequence[int]:
    if wanted.row is None:
        return range(min(wanted.limit, len(dataset)) if wanted.limit else len(dataset))
    found = [index for index, row in enumerate(dataset) if str(row[ROW_ID]).startswith(wanted.row)]
    if not found:
        raise RequestError(f"no row of input {wanted.input} has an id that begins with {wanted.row!r}")
    return found[: wanted.limit or None]


def _row(row_id: str, found: Sequence[TokenizedRow], ledger: RowLedger, tokenizer: Any) -> ReadRow:
    told = ledger.to_json()
    state = "; ".join([*told["states"], *told["changes"]])
    if ledger.truncated_tokens:
        state += f" by {ledger.truncated_tokens} tokens"
    parts = [(part.name, tuple(_spans(part, tokenizer))) for row in found for part in parts_of(row)]
    return ReadRow(row_id, state, tuple(parts))


def _spans(part: Part, tokenizer: Any) -> Iterator[Span]:
    tokens = zip(part.token_ids, part.learned, strict=True)
    for learned, group in itertools.groupby(tokens, key=lambda pair: bool(pair[1])):
        ids = tuple(token for token, _ in group)
        yield Span(ids, tokenizer.decode(ids), learned)
