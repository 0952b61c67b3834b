"""How much each row of a dataset counts in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from artifacts.errors import DataError
from stages.data.ledger import RowLedger
from stages.data.types import ROW_ID, Dataset, Row
from stages.names import nearest

WEIGHTLESS = "filtered: weight 0"


def row_weights(
    dataset: Dataset, weight_column: str | None, source_column: str, source_weights: Mapping[str, float]
) -> dict[str, float] | None:
    """row_id -> weight, from a column of numbers, from the row's source, or the product of both; None: all count 1.

    Raises DataError naming row and column for a weight that is missing, negative or no number, for a source that has
    no weight, and where no weight is above 0.
    """
    if weight_column is None and not source_weights:
        return None
    used = [column for column in (weight_column, source_column if source_weights else None) if column is not None]
    for column in used:
        if column not in dataset.columns:
            raise DataError(
                f"the dataset has no column {column!r}{nearest(column, dataset.columns)}; it has "
                f"{', '.join(dataset.columns)}"
            )
    weights = {}
    for row in dataset:
        weight = 1.0 if weight_column is None else _number(row, weight_column)
        if source_weights:
            weight *= _of_source(row, source_column, source_weights)
        weights[row[ROW_ID]] = weight
    if not any(weights.values()):
        raise DataError(f"every one of the {len(weights)} rows has weight 0; nothing would be trained")
    return weights


def without_idle_rows(dataset: Dataset, weights: Mapping[str, float], ledger: RowLedger) -> Dataset:
    """The rows whose weight is above 0; a step of others alone would have nothing to learn from."""
    kept = []
    for index, row in enumerate(dataset):
        if weights[row[ROW_ID]]:
            kept.append(index)
        else:
            ledger.drop(row[ROW_ID], WEIGHTLESS)
    return dataset.select(kept)


def _number(row: Row, column: str) -> float:
    value: Any = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"row {row[ROW_ID]}: field {column!r}: a weight is a number of at least 0; found {value!r}")
    return float(value)


def _of_source(row: Row, column: str, source_weights: Mapping[str, float]) -> float:
    value = row[column]
    if value not in source_weights:
        raise DataError(
            f"row {row[ROW_ID]}: field {column!r}: source {value!r} has no weight; source_weights names "
            f"{', '.join(source_weights)}"
        )
    return source_weights[value]
