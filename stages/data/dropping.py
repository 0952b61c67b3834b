"""Why a valid row is left out of a dataset, and what a row of a type must have."""

from __future__ import annotations

from stages.data.conversation import RowError
from stages.data.types import Row

EMPTY_TEXT = "filtered: empty text"
EMPTY_TOKENS = "filtered: no tokens"
EQUAL_PAIR = "filtered: chosen equals rejected"
NO_SHARED_PROMPT = "filtered: chosen and rejected share no prompt"


class Dropped(Exception):
    """The row is valid and of no use."""

    def __init__(self, state: str, detail: str = "") -> None:
        super().__init__(state)
        self.state, self.detail = state, detail


def require_columns(row: Row, columns: tuple[str, ...], where: str, kind: str) -> None:
    """Raises RowError for the first of the columns that is missing or null."""
    for column in columns:
        if row.get(column) is None:
            reason = f"a {kind} row has no {column!r}"
            found = f"columns {', '.join(name for name, value in row.items() if value is not None) or 'none'}"
            raise RowError(where, column, reason, found, "map it with `columns`, or choose another `type`")
