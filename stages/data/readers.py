"""One reader a format: a local file's rows as dicts, one at a time, each with the place it stands at."""

from __future__ import annotations

import csv
import io
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.faults import BadRow, what_is
from stages.data.files import FORMATS, SourceFile
from stages.data.strict_json import JsonError, lines, no_object, parse, parse_object
from stages.data.tools import JSON_COLUMNS
from stages.data.unpacking import DAMAGES, PACKINGS

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_BATCH = 1024
_COMMA, _TAB = ",", "\t"


def read_rows(file: SourceFile, path: Path, wanted: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(number from 1, row) of the local copy `path` of `file`, in `wanted` format or by its extension; in the place of
    a line that is no row, why. Rows of JSON lines have the numbers of their lines.

    Raises DataError for an unknown extension, a file without rows and whatever else is wrong with a row.
    """
    number, empty = 0, True
    try:
        name = _format(file, path, wanted)
        for number, row in enumerate(READERS[name](file, path), 1):
            if row is not None:
                empty = False
                yield number, row
    except DAMAGES as error:
        if not file.packing or getattr(error, "errno", None) is not None:
            raise
        kind = {".gz": "gzip", ".zst": "zstd"}[file.packing]
        damaged = f"{file.shown} row {number + 1}: the {kind} file is damaged or cut off: {error}; get it again"
        raise DataError(damaged) from error
    if empty:
        raise DataError(f"{file.shown} is empty: it has no row; give a file with rows or leave it out")


def _format(file: SourceFile, path: Path, wanted: str) -> str:
    name = FORMATS.get(file.suffix) if wanted == "auto" else wanted
    if name is None:
        raise DataError(
            f"{file.shown}: unknown extension {file.suffix!r}; set source.format, or use one of {', '.join(FORMATS)}"
        )
    if name == "json" and wanted == "auto":
        with _opened(file, path) as stream:  # many files of JSON lines are called .json
            start = stream.read(64).removeprefix(BOM_UTF8).lstrip()
        return "jsonl" if start.startswith(b"{") else "json"
    return name


def _opened(file: SourceFile, path: Path) -> IO[bytes]:
    return PACKINGS[file.packing](path) if file.packing else open(path, "rb")


def _jsonl(file: SourceFile, path: Path) -> Iterator[dict[str, Any] | BadRow | None]:
    """An empty line holds no row, wherever it stands, as in pandas, Arrow, jq and `datasets`."""
    with _opened(file, path) as stream:
        for number, line in enumerate(lines(stream, file.shown), 1):
            found = line if number > 1 else line.removeprefix(BOM_UTF8)  # which Windows likes to write
            yield _row_of_line(found, f"{file.shown} row {number}") if found.strip() else None


def _row_of_line(line: bytes, where: str) -> dict[str, Any] | BadRow:
    """The rows around a line can be read whatever it holds."""
    try:
        return parse_object(line, where)
    except JsonError as error:
        return BadRow(where, error.reason, error.said, say_drop=not error.of_the_file)


def _json(file: SourceFile, path: Path) -> Iterator[dict[str, Any] | BadRow]:
    with _opened(file, path) as stream:
        data = stream.read().removeprefix(BOM_UTF8)
    rows = parse(data, file.shown) if data.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{file.shown} holds {what_is(rows)}; give a list of objects, or JSON lines")
    for number, row in enumerate(rows, 1):
        yield row if isinstance(row, dict) else BadRow(f"{file.shown} row {number}", *no_object(row))


def _csv(file: SourceFile, path: Path) -> Iterator[dict[str, Any] | None]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number = 0
    try:
        with _text(file, path) as stream:
            apart = _TAB if file.suffix == ".tsv" else _COMMA
            first, second = stream.readline(), stream.readline()
            if problem := _apart_otherwise(first, second, apart):
                raise DataError(f"{file.shown}: the header is one field, {problem}")
            reader = csv.reader(chain(filter(None, (first, second)), stream), delimiter=apart, strict=True)
            header = next(reader, None)
            if header is not None and len(set(header)) != len(header):
                raise DataError(f"{file.shown}: the header names a column twice: {', '.join(header)}")
            for number, fields in enumerate(reader, 1):
                if not fields or (len(fields) == 1 != len(header or []) and not fields[0].strip()):
                    yield None  # an empty line, as csv.DictReader has it
                    continue
                if header is None or len(fields) != len(header):
                    raise DataError(
                        f"{file.shown} row {number} (line {reader.line_num}) has {len(fields)} fields, the header "
                        f"{len(header or [])}; quote fields that hold a comma or a line break"
                    )
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{file.shown} row {number + 1} is not CSV: {error}; close every quote, and double those inside of quoted "
            'fields: "she said ""no"""'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file.shown} after row {number} is not UTF-8; convert the file") from error


def _apart_otherwise(header: str, row: str, apart: str) -> str:
    """Of the first two lines of a file of one column that has several, most likely: by another character the row falls
    apart as the header does. One column that only looks so may have its header in quotes. Empty: nothing is wrong."""
    header = header.rstrip("\r\n")
    if apart in header or '"' in header:
        return ""
    for other in (";", _TAB):
        fields = header.count(other) + 1
        if fields > 1 and len(next(csv.reader([row], delimiter=other), ())) == fields:
            save = f"save it with {'tabs' if apart == _TAB else 'commas'} between them"
            do = "call the file .tsv" if other == _TAB else save
            return f"{header!r}: its columns are apart by {other!r}; {do}, or quote the header if it is one column"
    return ""


def _text(file: SourceFile, path: Path) -> IO[str]:
    return io.TextIOWrapper(_opened(file, path), encoding="utf-8-sig", newline="")


def _parquet(file: SourceFile, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(ROWS_PER_BATCH, use_threads=False):
                yield from table_rows(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.shown} cannot be read as Parquet: {error}") from error


def _arrow(file: SourceFile, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(stream)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(stream))
            for batch in batches:
                yield from table_rows(batch)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.shown} cannot be read as Arrow: {error}") from error


def table_rows(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, Any]]:
    """The rows of a table, without the fields of tools, tool calls and template arguments that are null.

    A column of objects gives every row the fields of all rows; in a call they would be arguments that nobody gave.
    """
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        if field.name in JSON_COLUMNS:
            for row in rows:
                row[field.name] = _without_nulls(row[field.name])
        elif "tool_calls" in str(field.type):
            for row in rows:
                row[field.name] = _with_own_calls(row[field.name])
    return rows


def _with_own_calls(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages
    return [_with_own_fields(turn) if isinstance(turn, dict) and "tool_calls" in turn else turn for turn in messages]


def _with_own_fields(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "tool_calls": _without_nulls(turn["tool_calls"])}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[SourceFile, Path], Iterator[dict[str, Any] | BadRow | None]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
