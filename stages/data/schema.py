"""Column types of rows that arrive one at a time, and an error where rows disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from artifacts.errors import DataError
from stages.data.faults import what_is
from stages.data.types import FURTHER_COLUMNS, TOKEN_TYPES

if TYPE_CHECKING:
    import pyarrow

ColumnType = str | tuple[str, Any]
"""`null`, `bool`, `int`, `float`, `string`, ("list", item type) or ("struct", {field: type})."""

_MESSAGES: ColumnType = ("list", ("struct", {"role": "string", "content": "string"}))
_INT64 = range(-(2**63), 2**63)


class ColumnTypes:
    """Observes rows; `schema()` then holds all of them. Whole numbers join floats, null joins everything."""

    def __init__(self, known: Mapping[str, ColumnType]) -> None:
        """`known`: the columns of the dataset type, which come first."""
        self._types: dict[str, ColumnType] = dict(known)

    def observe(self, where: str, row: Mapping[str, Any]) -> None:
        """Raises DataError naming `where` and the column when a value does not fit those seen before."""
        for column, value in row.items():
            before = self._types.get(column, "null")
            self._types[column] = _merged(before, _type_of(value, where, column), where, column)

    def known(self) -> dict[str, ColumnType]:
        """The types seen so far, by column."""
        return dict(self._types)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._types)

    def schema(self) -> pyarrow.Schema:
        """Raises DataError for a column that Parquet cannot hold (only empty objects)."""
        import pyarrow

        return pyarrow.schema([(name, _arrow_type(kind, name)) for name, kind in self._types.items()])


def typed_columns(text: tuple[str, ...], conversational: bool, dataset_type: str) -> dict[str, ColumnType]:
    """The types of `row_id` and of the columns that the dataset type asks for."""
    kinds: dict[str, ColumnType] = {"row_id": "string"}
    kinds.update(dict.fromkeys(text, _MESSAGES if conversational else "string"))
    if dataset_type == "unpaired_preference":
        kinds["label"] = "bool"
    if dataset_type == "stepwise_supervision":
        kinds |= {"completions": ("list", "string"), "labels": ("list", "bool")}
    if dataset_type in TOKEN_TYPES:
        kinds |= dict.fromkeys(FURTHER_COLUMNS[dataset_type], ("list", "int"))
    return kinds


def _type_of(value: Any, where: str, column: str) -> ColumnType:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if value not in _INT64:
            raise DataError(f"{where}: column {column!r}: {value} does not fit 64 bits; write it as text")
        return "int"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list | tuple):
        item: ColumnType = "null"
        for entry in value:
            item = _merged(item, _type_of(entry, where, f"{column}[]"), where, f"{column}[]")
        return ("list", item)
    if isinstance(value, Mapping):
        return (
            "struct",
            {str(name): _type_of(entry, where, f"{column}.{name}") for name, entry in value.items()},
        )
    raise DataError(
        f"{where}: column {column!r} holds {what_is(value)}; a dataset keeps text, numbers, "
        f"true/false, lists and objects of these: convert it, or leave it out with keep_columns"
    )


def _merged(before: ColumnType, now: ColumnType, where: str, column: str) -> ColumnType:
    if before == now or now == "null":
        return before
    if before == "null":
        return now
    if (before, now) in (("int", "float"), ("float", "int")):
        return "float"
    if isinstance(before, tuple) and isinstance(now, tuple) and before[0] == now[0]:
        if before[0] == "list":
            return ("list", _merged(before[1], now[1], where, f"{column}[]"))
        fields = dict(before[1])
        for name, kind in now[1].items():
            fields[name] = _merged(fields.get(name, "null"), kind, where, f"{column}.{name}")
        return ("struct", fields)
    raise DataError(
        f"{where}: column {column!r} holds a {_name(now)}, in rows before it a {_name(before)}; "
        f"a column has one type: make them equal, or leave the column out with keep_columns"
    )


def _name(kind: ColumnType) -> str:
    names = {"struct": "object", "bool": "true/false", "int": "whole number", "float": "number"}
    name = kind if isinstance(kind, str) else kind[0]
    return names.get(name, name)


def _arrow_type(kind: ColumnType, column: str) -> pyarrow.DataType:
    import pyarrow

    simple = {
        "null": pyarrow.null(),
        "bool": pyarrow.bool_(),
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "string": pyarrow.string(),
    }
    if isinstance(kind, str):
        return simple[kind]
    if kind[0] == "list":
        return pyarrow.list_(_arrow_type(kind[1], column))
    if not kind[1]:
        raise DataError(f"column {column!r} holds only empty objects; leave it out with keep_columns")
    return pyarrow.struct([(name, _arrow_type(entry, column)) for name, entry in kind[1].items()])
