"""Rows of whatever form to rows of one dataset type. The first row decides the form; every other must have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.data.conversation import (
    check_order,
    from_messages,
    from_transcript,
    is_transcript,
)
from stages.data.faults import EMPTY_TEXT, EQUAL_PAIR, Dropped, RowError
from stages.data.pretokenized import require_equal_columns
from stages.data.shapes import (
    SHAPES,
    USED_COLUMNS,
    detect_type,
    from_alpaca,
    from_conversations,
    without_repeated_prompt,
)
from stages.data.tools import TOOLS, tool_schemas
from stages.data.types import (
    FURTHER_COLUMNS,
    OPTIONAL_COLUMNS,
    PAIRED,
    ROW_ID,
    TOKEN_MASKS,
    Message,
    Row,
    required_columns,
    text_columns,
)

RECOGNIZED = frozenset(
    [
        "text",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "reference",
        "label",
        "completions",
        "labels",
        "instruction",
        "input",
        "output",
        *FURTHER_COLUMNS["pretokenized"],
        *FURTHER_COLUMNS["pretokenized_preference"],
        *TOKEN_MASKS,
        TOOLS,
    ]
)
"""Source columns that a typed row may be made of."""


Note = Callable[[str, str], None]
"""(what was changed, detail)."""


class Converter:
    """Converts rows of one source; holds the form that its first row had."""

    def __init__(self, wanted: str, system: str | None) -> None:
        """`wanted`: a dataset type or `auto`. `system`: put before conversations that have no system message."""
        self._wanted = wanted
        self._system = system
        self.type = ""
        self.conversational = False
        self.optional: tuple[str, ...] = ()
        """Those of the type's optional columns that the rows have."""
        self._transcripts: set[str] = set()

    def convert(self, row: Row, where: str, note: Note) -> Row:
        """The typed row: the type's columns, then the others. Raises RowError or Dropped."""
        if ROW_ID in row:
            do = "map it to another name: columns: {source_id: row_id}"
            raise RowError(where, ROW_ID, "the column name is ours", do=do)
        row = from_alpaca(from_conversations(dict(row)))
        kind = self.type or (detect_type(row, where) if self._wanted == "auto" else self._wanted)
        first = not self.type
        if first:
            texts = {name: row[name] for name in USED_COLUMNS[kind] if isinstance(row.get(name), str)}
            self._transcripts = {name for name, text in texts.items() if is_transcript(text)}
        for name in USED_COLUMNS[kind]:
            if row.get(name) is not None:
                row[name] = self._standardized(row[name], where, name, note)
        row = SHAPES[kind](without_repeated_prompt(row, USED_COLUMNS[kind]), where)
        optional = tuple(name for name in OPTIONAL_COLUMNS.get(kind, ()) if name in row)
        if not first and kind == "pretokenized":
            require_equal_columns(row, self.optional, where)
        conversational = _form(row, kind, where)
        if not first and conversational != self.conversational:
            reason = f"mixed types: the rows before it hold {'messages' if self.conversational else 'text'}"
            found = "messages" if conversational else "text"
            raise RowError(where, text_columns(kind, conversational)[0], reason, found, "make all rows alike")
        row = self._checked(row, kind, conversational, where)
        self.type, self.conversational, self.optional = kind, conversational, optional
        return row

    def _standardized(self, value: Any, where: str, name: str, note: Note) -> Any:
        if isinstance(value, str):
            return from_transcript(value, where, name) if name in self._transcripts else value
        if isinstance(value, list):
            messages, left_out = from_messages(value, where, name)
            if left_out:
                note(f"message fields left out: {', '.join(left_out)}", name)
            return messages
        raise RowError(where, name, "must be text or a list of messages", f"a {type(value).__name__}")

    def _checked(self, row: Row, kind: str, conversational: bool, where: str) -> Row:
        columns = required_columns(kind, conversational)
        typed = {column: row[column] for column in (*columns, *OPTIONAL_COLUMNS.get(kind, ())) if column in row}
        if conversational:
            first = columns[0]
            if self._system is not None and typed[first][:1] and typed[first][0]["role"] != "system":
                typed[first] = [{"role": "system", "content": self._system}, *typed[first]]
            _check_conversation(typed, kind, where)
            row = {**row, TOOLS: tool_schemas(row[TOOLS], where)} if TOOLS in row else row
        elif self._system is not None:
            raise RowError(where, columns[0], "a system message needs conversational rows", "text")
        _drop_useless(typed, kind, text_columns(kind, conversational))
        return {**typed, **{name: value for name, value in row.items() if name not in typed}}


def _form(row: Row, kind: str, where: str) -> bool:
    """Whether the row is conversational. Raises RowError where one column is and another is not."""
    chat = kind == "language_modeling" and row.get("messages") is not None
    columns = text_columns(kind, chat)
    forms = {isinstance(row[column], list) for column in columns}
    if not columns:
        return False
    if len(forms) != 1 or (chat and forms != {True}):
        held = ", ".join(f"{name} is {'messages' if isinstance(row[name], list) else 'text'}" for name in columns)
        raise RowError(where, columns[-1], "mixed types: text and messages in one row", held)
    return forms.pop()


def _check_conversation(typed: dict[str, Any], kind: str, where: str) -> None:
    for column, messages in typed.items():
        if column not in text_columns(kind, True):
            continue
        if column in ("messages", "prompt"):
            ends = "assistant" if column == "messages" else "user"
            check_order(messages, where, column, begins="user", ends=ends)
        elif messages:
            check_order(messages, where, column, begins="assistant", ends="assistant")
        else:
            reason = "the conversation does not end with the assistant"
            raise RowError(where, column, reason, "nothing after the prompt")


def _drop_useless(typed: dict[str, Any], kind: str, texts: tuple[str, ...]) -> None:
    for column in texts:
        if _is_empty(typed[column]):
            raise Dropped(EMPTY_TEXT, column)
    if kind in PAIRED and texts and typed["chosen"] == typed["rejected"]:
        raise Dropped(EQUAL_PAIR)


def _is_empty(value: str | list[Message]) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not value[-1]["content"].strip() and "tool_calls" not in value[-1]
