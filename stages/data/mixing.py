"""The work of the stage `mixture`: how many rows of each dataset, which, and in what order.

All of it follows from weights, seed and row ids: neither the order of rows nor workers can change it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import IO, TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.dataset import column_types, merge, read_dataset, write_dataset
from stages.data.ledger import RowLedger, say_dropped
from stages.data.schema import ColumnTypes
from stages.data.tools import stored
from stages.data.types import OPTIONAL_COLUMNS, ROW_ID, Dataset, Row, text_columns
from stages.seeds import derive

if TYPE_CHECKING:
    from stages.context import Context
    from stages.mixture import Config

NOT_DRAWN = "filtered: not drawn by weight"
REPEATED = "further copies of rows"


def rows_of_each(sizes: Sequence[int], weights: Sequence[float], rows: int | str) -> list[int]:
    """Rows of each dataset, as near to the weights as whole numbers can be.

    A number: the largest remainders are rounded up, so that they sum to it; of equal ones the first. `first_exhausted`:
    the most that repeats no row, rounded down. `all_exhausted`: the fewest that use every row, rounded up.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if isinstance(rows, int):
        wanted = [share * rows for share in shares]
        counts = [int(one) for one in wanted]
        order = sorted(range(len(wanted)), key=lambda index: (counts[index] - wanted[index], index))
        for index in order[: rows - sum(counts)]:
            counts[index] += 1
        return counts
    totals = [size / share for size, share in zip(sizes, shares, strict=True)]
    if rows == "first_exhausted":
        return [int(min(totals) * share) for share in shares]
    return [math.ceil(max(totals) * share) for share in shares]


def copies_of_each(row_ids: Sequence[str], count: int, seed: int) -> list[int]:
    """How often each row is used: all equally often, and of a rest, those that the seed draws once more."""
    whole, rest = divmod(count, len(row_ids))
    ranked = sorted(range(len(row_ids)), key=lambda index: derive(seed, "mixture", row_ids[index]))
    copies = [whole] * len(row_ids)
    for index in ranked[:rest]:
        copies[index] += 1
    return copies


def copy_id(row_id: str, number: int) -> str:
    """The id of a row's first, second, ... use: `id`, `id*2`, ..."""
    return row_id if number == 1 else f"{row_id}*{number}"


def mix(context: Context) -> None:
    """Runs the stage. Raises DataError for datasets that do not fit together, and for a share that is no row."""
    config: Config = context.config
    context.phase("drawing rows")
    datasets = [read_dataset(folder) for folder in context.inputs_of("datasets")]
    _require_fit(config, datasets)
    counts = rows_of_each([len(dataset) for dataset in datasets], config.weights, config.rows)
    names = config.names or [f"dataset {number}" for number in range(1, len(datasets) + 1)]
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise DataError(f"{name} would give no row under these weights; raise its weight or rows, or leave it out")
        context.counts[f"rows of {name}"] = count
    with tempfile.TemporaryFile(dir=context.scratch) as file:
        mixture = _Mixture(config, file, datasets[0])
        for part, (dataset, count) in enumerate(zip(datasets, counts, strict=True)):
            mixture.take(part, dataset, count)
        mixture.ledger.check(sum(map(len, datasets)))
        say_dropped(context, mixture.ledger.states)
        context.phase("writing the dataset")
        context.metrics["rows"] = write_dataset(
            context.output("dataset"),
            mixture.rows(),
            type=datasets[0].type,
            conversational=datasets[0].conversational,
            ledger=mixture.ledger,
            source={"mixture": [_described(*one) for one in zip(names, datasets, counts, strict=True)]},
            types=mixture.types,
        )


def _described(name: str, dataset: Dataset, count: int) -> dict[str, Any]:
    return {"name": name, "rows": len(dataset), "drawn": count}


def _require_fit(config: Config, datasets: Sequence[Dataset]) -> None:
    if len(config.weights) != len(datasets):
        raise DataError(f"weights has {len(config.weights)} numbers for {len(datasets)} datasets; give one for each")
    first = merge(datasets)  # of one type, and every row in one of them only
    for number, dataset in enumerate(datasets, 1):
        for column in OPTIONAL_COLUMNS.get(first.type, ()):
            if (column in dataset.columns) != (column in datasets[0].columns):
                raise DataError(f"datasets 1 and {number}: one has column {column!r}, the other none; give it to both")
        if config.names is not None and config.source_column in dataset.columns:
            raise DataError(
                f"dataset {number} has a column {config.source_column!r} already; give another source_column"
            )


class _Mixture:
    """The drawn rows on disk, each once, and the order in which their copies come."""

    def __init__(self, config: Config, file: IO[bytes], like: Dataset) -> None:
        self.config, self.file = config, file
        self.ledger = RowLedger()
        self.types: ColumnTypes = column_types(like.type, like.conversational)
        self._messages = text_columns(like.type, True) if like.conversational else ()
        self._places: list[tuple[int, int, int]] = []
        """(rank in the order, number of the copy, place in the file)."""

    def take(self, part: int, dataset: Dataset, count: int) -> None:
        """Draw `count` rows of a dataset, copies included."""
        ids = [row[ROW_ID] for row in dataset]
        for row, copies in zip(dataset, copies_of_each(ids, count, self.config.seed), strict=True):
            if copies == 0:
                self.ledger.drop(row[ROW_ID], NOT_DRAWN)
                continue
            self.ledger.use(row[ROW_ID])
            if copies > 1:
                self.ledger.change(REPEATED, row[ROW_ID], f"used {copies} times", copies - 1)
            self._keep(part, row, copies)

    def _keep(self, part: int, row: Row, copies: int) -> None:
        if self.config.names is not None:
            row = {**row, self.config.source_column: self.config.names[part]}
        row = stored(row, self._messages)
        self.types.observe(f"row {row[ROW_ID]}", row)
        place = self.file.tell()
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        for number in range(1, copies + 1):
            rank = derive(self.config.seed, "mixture order", row[ROW_ID], number)
            self._places.append((rank, number, place))

    def rows(self) -> Iterator[Row]:
        """Every copy in the order of the mixture."""
        for _, number, place in sorted(self._places):
            self.file.seek(place)
            row = json.loads(self.file.readline())
            yield {**row, ROW_ID: copy_id(row[ROW_ID], number)}
