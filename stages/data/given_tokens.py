"""Pretokenized rows where they are used: their token ids must be the model's, their masks those that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.errors import DataError
from stages.data.pretokenized import IGNORED
from stages.data.types import FURTHER_COLUMNS, ROW_ID, TOKEN_TYPES, Dataset, Row

_ASKED_BY = {"completion_mask": "completion_only_loss", "assistant_masks": "assistant_only_loss"}


def require_masks(dataset: Dataset, assistant_only: bool, completion_only: bool | None) -> None:
    """Raises DataError where a mask is asked for that the rows do not have."""
    for column, asked in (("completion_mask", completion_only), ("assistant_masks", assistant_only)):
        if asked and column not in dataset.columns:
            raise DataError(
                f"{_ASKED_BY[column]}: this pretokenized dataset has no column {column!r}; it has "
                f"{', '.join(dataset.columns)}: leave the setting out, or give the column"
            )


def require_vocabulary(dataset: Dataset, vocabulary: int) -> Dataset:
    """The dataset. Raises DataError naming row and place of a token id that a model of so many does not have."""
    if dataset.type in TOKEN_TYPES:
        for row in dataset:
            for column in FURTHER_COLUMNS[dataset.type]:
                _require_known(row, column, vocabulary)
    return dataset


def given_sequence(row: Row, assistant_only: bool, completion_only: bool | None) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is trained): where its label says so, and every mask that applies.

    `completion_mask` applies unless completion_only is False, `assistant_masks` if assistant_only.
    """
    token_ids = list(row["input_ids"])
    mask = [True] * len(token_ids)
    if row.get("labels") is not None:
        mask = [label != IGNORED for label in row["labels"]]
    for column, applies in (("completion_mask", completion_only is not False), ("assistant_masks", assistant_only)):
        if applies and row.get(column) is not None:
            mask = [trained and own for trained, own in zip(mask, row[column], strict=True)]
    return token_ids, mask


def given_pair(row: Row) -> tuple[list[int], list[list[int]]]:
    """(prompt, [prompt with chosen, prompt with rejected])."""
    prompt = list(row["prompt_ids"])
    return prompt, [[*prompt, *row[column]] for column in ("chosen_ids", "rejected_ids")]


def _require_known(row: Row, column: str, vocabulary: int) -> None:
    token_ids: Sequence[int] = row[column]
    if token_ids and max(token_ids) >= vocabulary:
        place = next(index for index, token in enumerate(token_ids) if token >= vocabulary)
        raise DataError(
            f"row {row[ROW_ID]}: field '{column}[{place}]': token id {token_ids[place]}, but the model's vocabulary "
            f"has {vocabulary}; the rows were made with another tokenizer: tokenize them with the model's"
        )
