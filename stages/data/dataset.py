"""Datasets as folders: `data.parquet` (or several files that `dataset.json` names), `dataset.json`, `ledger.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from artifacts.digest import canonical_json
from artifacts.errors import DataError
from stages.data.ledger import RowLedger
from stages.data.schema import ColumnTypes, typed_columns
from stages.data.table_rows import ChainedRows, TableRows
from stages.data.tools import JSON_COLUMNS, stored
from stages.data.types import ROW_ID, TEXT_COLUMNS, Dataset, Row, required_columns, text_columns

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

DATA_FILE = "data.parquet"
DESCRIPTION_FILE = "dataset.json"
ROWS_PER_GROUP = 1024


def column_types(dataset_type: str, conversational: bool) -> ColumnTypes:
    """An observer that knows `row_id` and the columns of the type."""
    text = text_columns(dataset_type, conversational)
    return ColumnTypes(typed_columns(text, conversational, dataset_type))


def write_dataset(
    folder: Path,
    rows: Iterable[Row],
    *,
    type: str,
    conversational: bool,
    ledger: RowLedger,
    source: Mapping[str, Any],
    types: ColumnTypes | None = None,
) -> int:
    """Writes the three files and returns the number of rows.

    `types`: observed over these rows beforehand; then they are streamed, else they are held in memory once.
    Equal rows, ledger and source give equal bytes. Raises DataError for a row without a required column, and
    when there is no row at all.
    """
    messages = text_columns(type, True) if conversational else ()
    rows = (stored(row, messages) for row in rows) if conversational else rows
    if types is None:
        rows = list(rows)
        types = column_types(type, conversational)
        for row in rows:
            types.observe(f"row {row.get(ROW_ID)}", row)
    count = _write_parquet(folder / DATA_FILE, rows, types.schema(), required_columns(type, conversational))
    describe_dataset(folder, Description(type, conversational, count, types.columns, source), ledger)
    return count


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says. `files`: those that hold the rows, in order; None: `data.parquet` alone."""

    type: str
    conversational: bool
    rows: int
    columns: tuple[str, ...]
    source: Mapping[str, Any]
    files: tuple[str, ...] | None = None


def describe_dataset(folder: Path, description: Description, ledger: RowLedger) -> None:
    """Writes what stands beside the rows. Raises DataError when there is no row at all."""
    if description.rows == 0:
        raise DataError(f"no row is left for the dataset ({ledger.summary() or 'there were none'})")
    told: dict[str, Any] = {
        "type": description.type,
        "conversational": description.conversational,
        "rows": description.rows,
        "columns": list(description.columns),
        "source": dict(description.source),
    }
    if description.files is not None:
        told["files"] = list(description.files)
    (folder / DESCRIPTION_FILE).write_bytes(canonical_json(told) + b"\n")
    ledger.write(folder)


def _write_parquet(path: Path, rows: Iterable[Row], schema: pyarrow.Schema, required: tuple[str, ...]) -> int:
    import pyarrow

    count = 0
    remaining = iter(rows)
    with parquet_writer(path, schema) as writer:
        while block := list(islice(remaining, ROWS_PER_GROUP)):
            for row in block:
                for column in (ROW_ID, *required):
                    if row.get(column) is None:
                        raise DataError(f"row {row.get(ROW_ID)} has no {column!r}; found columns: {', '.join(row)}")
            writer.write_table(pyarrow.Table.from_pylist(block, schema=schema), row_group_size=ROWS_PER_GROUP)
            count += len(block)
    return count


def parquet_writer(file: Path | BinaryIO, schema: pyarrow.Schema) -> pyarrow.parquet.ParquetWriter:
    """Equal tables give equal bytes (of one version of Arrow): its settings are the same everywhere, and nothing of
    the clock or the machine is among its metadata."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


def read_parquet(source: Path | BinaryIO) -> pyarrow.Table:
    """The rows of one file, its checksums checked. pyarrow's `read_table` would load pandas for it: a third of a second
    of every stage."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source, page_checksum_verification=True) as file:
        return file.read(use_threads=False)


def read_dataset(folder: Path) -> Dataset:
    """The dataset in that folder; rows are decoded as they are asked for.

    Raises DataError when a file is missing or the files contradict each other.
    """
    description = _description(folder)
    dataset_type, conversational = description["type"], description["conversational"]
    files = description.get("files", [DATA_FILE])
    table = _read_files([folder / name for name in files])
    for column in (ROW_ID, *required_columns(dataset_type, conversational)):
        if column not in table.column_names:
            raise DataError(f"{folder / DATA_FILE}: no column {column!r}; found {', '.join(table.column_names)}")
    if table.num_rows != description["rows"]:
        raise DataError(
            f"{folder}: {', '.join(files)} has {table.num_rows} rows, {DESCRIPTION_FILE} says "
            f"{description['rows']}; write the dataset again"
        )
    messages = _messages_with_calls(table.schema, dataset_type, folder) if conversational else None
    return Dataset(dataset_type, conversational, tuple(table.column_names), TableRows(table, messages))


def rows_files(folder: Path) -> tuple[str, ...]:
    """The names of a dataset's files with rows, in order. Raises DataError where it is none."""
    return tuple(_description(folder).get("files", [DATA_FILE]))


def _read_files(paths: Sequence[Path]) -> pyarrow.Table:
    import pyarrow

    tables = []
    for path in paths:
        try:
            tables.append(read_parquet(path))
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}; make the dataset again") from error
    return pyarrow.concat_tables(tables)


def _messages_with_calls(schema: pyarrow.Schema, dataset_type: str, folder: Path) -> tuple[str, ...] | None:
    """The columns of messages where these or the rows hold more than text; None where all is as it lies there."""
    import pyarrow

    held = {name: schema.field(name).type for name in JSON_COLUMNS if name in schema.names}
    held = {name: kind for name, kind in held.items() if not pyarrow.types.is_null(kind)}
    for name, kind in held.items():
        if not pyarrow.types.is_string(kind):
            raise DataError(f"{folder / DATA_FILE}: column {name!r} is not JSON text; normalize the source again")
    columns = text_columns(dataset_type, True)
    plain = all(schema.field(column).type.value_type.num_fields == 2 for column in columns)
    return None if plain and not held else columns


def _description(folder: Path) -> dict[str, Any]:
    _require_file(folder, DESCRIPTION_FILE)
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_bytes())
        known = description["type"] in TEXT_COLUMNS and isinstance(description["conversational"], bool)
        rows = description["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DESCRIPTION_FILE} does not describe a dataset: {error!r}") from error
    if not known or not isinstance(rows, int):
        raise DataError(f"{folder / DESCRIPTION_FILE}: unknown dataset type {description['type']!r}")
    for name in description.get("files", [DATA_FILE]):
        _require_file(folder, name)
    return dict(description)


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise DataError(f"{folder} is not a dataset: it has no {name}; make one with the stage `normalize`")


def merge(datasets: Sequence[Dataset]) -> Dataset:
    """The rows of all, in order. Raises DataError when their types differ or a row occurs twice."""
    if len(datasets) == 1:
        return datasets[0]
    kinds = sorted({(dataset.type, dataset.conversational) for dataset in datasets})
    if len(kinds) != 1:
        names = ", ".join(f"{name} ({'conversational' if chat else 'standard'})" for name, chat in kinds)
        raise DataError(f"datasets of different types cannot be joined: {names}; normalize them to one type")
    seen: set[str] = set()
    for dataset in datasets:
        for row_id in _row_ids(dataset):
            if row_id in seen:
                raise DataError(f"row {row_id} is in more than one of the given datasets; give each dataset once")
            seen.add(row_id)
    columns = tuple(dict.fromkeys(column for dataset in datasets for column in dataset.columns))
    return Dataset(*kinds[0], columns, ChainedRows([dataset.rows for dataset in datasets]))


def _row_ids(dataset: Dataset) -> Iterator[str]:
    if isinstance(dataset.rows, TableRows):
        return iter(dataset.rows.table.column(ROW_ID).to_pylist())
    return (row[ROW_ID] for row in dataset.rows)
