"""Output `rollouts` of on-line learning: the saved generations as files of one dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts import Shards
from stages.context import Context
from stages.data.dataset import ROWS_PER_GROUP, Description, describe_dataset, parquet_writer
from stages.data.ledger import RowLedger
from stages.training.rollout_records import record_types, saved_tables

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_FILE = 16_384
"""A file of the artifact ends with the generation that reaches so many rows."""


def write_rollouts(context: Context, generations: int) -> None:
    """Output `rollouts`: the shards of so many generations, as a dataset that `rescore`, `normalize` and the training
    stages can read; never more than one of them in memory."""
    folder = context.output("rollouts")
    schema = _common_schema(context.shards, generations)
    files, count = _write_files(folder, saved_tables(context.shards, generations), schema)
    ledger = RowLedger()
    ledger.use(count)
    conversational = not _is_text(schema)
    source = {"stage": context.spec.stage}
    description = Description("prompt_completion", conversational, count, tuple(schema.names), source, files)
    describe_dataset(folder, description, ledger)
    context.counts["rollouts"] = count


def _write_files(folder: Path, tables: Iterator[pyarrow.Table], schema: pyarrow.Schema) -> tuple[tuple[str, ...], int]:
    """(names of the files, rows in all)"""
    import pyarrow

    names: list[str] = []
    count = 0
    table = next(tables, None)
    while table is not None:
        names.append(f"data-{len(names):05d}.parquet")
        rows = 0
        with parquet_writer(folder / names[-1], schema) as writer:
            while table is not None and rows < ROWS_PER_FILE:
                whole = table if table.schema == schema else pyarrow.Table.from_pylist(table.to_pylist(), schema=schema)
                writer.write_table(whole, row_group_size=ROWS_PER_GROUP)
                rows += table.num_rows
                table = next(tables, None)
        count += rows
    return tuple(names), count


def _common_schema(shards: Shards, generations: int) -> pyarrow.Schema:
    """That of all shards; messages may have fields in some that they have not in others."""
    schemas = []
    for table in saved_tables(shards, generations):
        if table.schema not in schemas:
            schemas.append(table.schema)
    if len(schemas) == 1:
        return schemas[0]
    rewards = [name.removeprefix("reward_") for name in schemas[0].names if name.startswith("reward_")]
    types = record_types(not _is_text(schemas[0]), rewards, set(schemas[0].names))
    for table in saved_tables(shards, generations):
        for row in table.to_pylist():
            types.observe(f"row {row['row_id']}", {name: row[name] for name in ("prompt", "completion")})
    return types.schema()


def _is_text(schema: pyarrow.Schema) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(schema.field("prompt").type))
