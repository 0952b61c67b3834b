"""What can be wrong with a row, and why a valid one is left out of a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping

from artifacts.errors import DataError
from stages.data.types import Row

EMPTY_TEXT = "filtered: empty text"
EMPTY_TOKENS = "filtered: no tokens"
EQUAL_PAIR = "filtered: chosen equals rejected"
NO_SHARED_PROMPT = "filtered: chosen and rejected share no prompt"

EMPTY_COMPLETION = "the completion is empty"
FILL = "fill it in"
_LEFT_OUT = "; on_bad_row: drop would leave such rows out"
"""Said where nobody drops them: it is no part of a `detail`, which the ledger shows of a row that was dropped."""
_INDEX = re.compile(r"\[\d+\]")


class BadRow(DataError):
    """A row is wrong, and those beside it need not be.

    `reason` is the same for every row with that fault; `detail` says what was found and what to do, and names no path;
    `told` has the place before it.
    """

    def __init__(self, where: str, reason: str, said: str, *, say_drop: bool = True) -> None:
        """`said` goes on where the place ends: ` is not JSON`, `: field 'text': ...`. `say_drop`: other rows need not
        be like it, so that they can do without it."""
        self.reason, self.detail, self.told = reason, said.removeprefix(":").strip(), f"{where}{said}"
        super().__init__(self.told + (_LEFT_OUT if say_drop else ""))


class RowError(BadRow):
    """A field of a row is wrong. `column`: with the way inside it (`messages[3].tool_calls`), which is no part of the
    reason but for the index."""

    def __init__(
        self,
        where: str,
        column: str,
        reason: str,
        found: str = "",
        do: str = "correct the row",
        *,
        say_drop: bool = True,
        theirs: str = "",
    ) -> None:
        self._parts = (where, column, reason, found, do, say_drop)
        told = "; ".join(part for part in (reason, found and f"found {found}", do) if part)
        named, came_as = _INDEX.sub("", column), f" (column {theirs!r})" if theirs else ""
        super().__init__(where, f"field {named!r}: {reason}", f": field {column!r}{came_as}: {told}", say_drop=say_drop)

    def of(self, columns: Mapping[str, str]) -> RowError:
        """The same with the name that the source has for the column. `columns`: ours -> theirs."""
        where, column, reason, found, do, say_drop = self._parts
        theirs = columns.get(column.partition(".")[0].partition("[")[0], "")
        return RowError(where, column, reason, found, do, say_drop=say_drop, theirs=theirs)


class Dropped(Exception):
    """The row is valid and of no use."""

    def __init__(self, state: str, detail: str = "") -> None:
        super().__init__(state)
        self.state, self.detail = state, detail


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def what_is(value: object) -> str:
    """`a list`, `null`: what a value is in the words of JSON."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def require_columns(row: Row, columns: tuple[str, ...], where: str, row_type: str) -> None:
    """Raises RowError for the first of the columns that is missing or null."""
    for column in columns:
        if row.get(column) is None:
            reason = f"a {row_type} row has no {column!r}"
            found = ", ".join(name for name, value in row.items() if value is not None)
            found = f"columns {found}" if found else "null in all columns"
            do = f"map it with `columns: {{{column}: theirs}}`, or choose another `type`"
            raise RowError(where, column, reason, found, do)
