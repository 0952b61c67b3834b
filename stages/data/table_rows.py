"""Rows of Arrow tables as dicts, decoded as they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, overload

from stages.data.tools import read
from stages.data.types import Row

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_BLOCK = 1024


class TableRows(Sequence[Row]):
    """Rows of an Arrow table as dicts; decodes the block that was asked for last and holds it."""

    def __init__(self, table: pyarrow.Table, messages: tuple[str, ...] | None = None) -> None:
        """`messages`: the columns of messages, where JSON text in them or beside them is to be read."""
        self.table, self._messages = table, messages
        self._block = -1
        self._decoded: list[Row] = []

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        block = position // ROWS_PER_BLOCK
        if block != self._block:
            self._decoded = self.table.slice(block * ROWS_PER_BLOCK, ROWS_PER_BLOCK).to_pylist()
            if self._messages is not None:
                self._decoded = [read(row, self._messages) for row in self._decoded]
            self._block = block
        return self._decoded[position % ROWS_PER_BLOCK]


class ChainedRows(Sequence[Row]):
    """Sequences of rows, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self._ends, position)
        return self._parts[part][position - (self._ends[part - 1] if part else 0)]
