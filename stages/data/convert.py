"""Rows of whatever form to rows of one dataset type. The first row decides the form; every other must have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from stages.data.conversation import (
    check_order,
    from_json_text,
    from_messages,
    from_transcript,
    is_transcript,
)
from stages.data.faults import EMPTY_COMPLETION, EMPTY_TEXT, EQUAL_PAIR, FILL, Dropped, RowError, what_is
from stages.data.pretokenized import require_equal_columns
from stages.data.shapes import (
    COMPLETIONS,
    SHAPES,
    USED_COLUMNS,
    detect_type,
    form_of,
    from_alpaca,
    from_conversations,
    require_form,
    without_repeated_prompt,
)
from stages.data.template_arguments import refuse_template_arguments, template_arguments
from stages.data.tools import TEMPLATE_ARGUMENTS, TOOLS, tool_schemas
from stages.data.types import (
    FURTHER_COLUMNS,
    OPTIONAL_COLUMNS,
    PAIRED,
    ROW_ID,
    TEXT_COLUMNS,
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
        "privileged_context",
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


_FOR_TEMPLATE: dict[str, Callable[[Any, str], Any]] = {TOOLS: tool_schemas, TEMPLATE_ARGUMENTS: template_arguments}
"""The columns of conversational rows that chat templates read beside messages, and what makes one valid."""

Note = Callable[[str, str], None]
"""(what was changed, detail)."""


class Converter:
    """Converts rows of one source; holds the form that its first row had."""

    def __init__(self, wanted: str, system: str | None, arguments: Mapping[str, Any]) -> None:
        """`wanted`: a dataset type or `auto`. `system`: put before conversations that have no system message.
        `arguments`: of the chat template, where a row gives none of that name."""
        self._wanted = wanted
        self._system = system
        self._arguments = arguments
        self.type = ""
        self.conversational = False
        self.optional: tuple[str, ...] = ()
        """Those of the type's optional columns that the rows have."""
        self._transcripts: set[str] = set()
        self._form: tuple[str, ...] = ()

    def convert(self, row: Row, where: str, note: Note) -> Row:
        """The typed row: the type's columns, then the others. Raises RowError or Dropped."""
        if ROW_ID in row:
            do = "map it to another name: columns: {source_id: row_id}"
            raise RowError(where, ROW_ID, "the column name is ours", do=do, say_drop=False)
        row = from_alpaca(from_conversations(dict(row)))
        kind = self.type or (detect_type(row, where) if self._wanted == "auto" else self._wanted)
        first = not self.type
        if not first:
            require_form(row, self._form, where, kind)
        else:
            self._form = form_of(row, kind)
            texts = {name: row[name] for name in USED_COLUMNS[kind] if isinstance(row.get(name), str)}
            self._transcripts = {name for name, text in texts.items() if is_transcript(text)}
        for name in USED_COLUMNS[kind]:
            if row.get(name) is not None:
                row[name] = self._standardized(row[name], where, name, note)
        row = without_repeated_prompt(row, USED_COLUMNS[kind], transcript="prompt" in self._transcripts)
        row = SHAPES[kind](row, where)
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
        if isinstance(value, str) and name in self._transcripts:
            return from_transcript(value, where, name)
        if isinstance(value, str) and name == "messages":  # other columns may be text
            value = from_json_text(value, where, name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            messages, left_out = from_messages(value, where, name)
            if left_out:
                note(f"message fields left out: {', '.join(left_out)}", name)
            return messages
        raise RowError(where, name, "must be text or a list of messages", what_is(value))

    def _checked(self, row: Row, kind: str, conversational: bool, where: str) -> Row:
        columns = required_columns(kind, conversational)
        typed = {column: row[column] for column in (*columns, *OPTIONAL_COLUMNS.get(kind, ())) if column in row}
        if conversational:
            first = columns[0]
            if self._system is not None and typed[first][:1] and typed[first][0]["role"] != "system":
                typed[first] = [{"role": "system", "content": self._system}, *typed[first]]
            _check_conversation(typed, kind, where)
            row = {**row, **{name: _FOR_TEMPLATE[name](row[name], where) for name in _FOR_TEMPLATE if name in row}}
            if self._arguments:
                given = {**self._arguments, **(row.get(TEMPLATE_ARGUMENTS) or {})}
                row[TEMPLATE_ARGUMENTS] = template_arguments(given, where)
        elif self._system is not None:
            raise _of_conversations("a system message needs", columns[0], "system", where)
        elif self._arguments:
            raise _of_conversations("chat_template_kwargs need", columns[0], "chat_template_kwargs", where)
        else:
            refuse_template_arguments(row, kind, where)
        _check_texts(typed, kind, where)
        if kind in PAIRED and row.get("margin") is not None:
            _check_margin(row["margin"], where)
        return {**typed, **{name: value for name, value in row.items() if name not in typed}}


def _form(row: Row, kind: str, where: str) -> bool:
    """Whether the row is conversational. Raises RowError where one column is and another is not."""
    chat = kind == "language_modeling" and row.get("messages") is not None
    columns = text_columns(kind, chat)
    if not columns:
        return False
    conversational = chat or isinstance(row[columns[0]], list)
    odd = next((name for name in columns if isinstance(row[name], list) != conversational), None)
    if odd is not None:
        held = ", ".join(f"{name} is {'messages' if isinstance(row[name], list) else 'text'}" for name in columns)
        do = "give all of them as text, or all as messages (`templates` makes messages of text)"
        raise RowError(where, odd, "mixed types: text and messages in one row", held, do)
    return conversational


def _of_conversations(reason: str, column: str, setting: str, where: str) -> RowError:
    do = f"take {setting} out, or make messages of the text (`templates`)"
    return RowError(where, column, f"{reason} conversational rows", "text", do, say_drop=False)


def _check_conversation(typed: dict[str, Any], kind: str, where: str) -> None:
    for column, messages in typed.items():
        if column not in text_columns(kind, True):
            continue
        if column in ("messages", "prompt"):
            ends = "assistant" if column == "messages" else "user"
            check_order(messages, where, column, begins="user", ends=ends)
        elif column == "privileged_context":
            _check_context(messages, where, column)
        elif messages:
            check_order(messages, where, column, begins="assistant", ends="assistant")
        else:
            reason = "the conversation does not end with the assistant"
            raise RowError(where, column, reason, "nothing after the prompt")


def _check_context(messages: list[Message], where: str, column: str) -> None:
    """Messages in any order, whose contents are what is known."""
    if not messages:
        raise RowError(where, column, "a conversation without messages")
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            raise RowError(where, f"{column}[{number}].tool_calls", "a privileged context is text, without tool calls")


def _check_texts(typed: dict[str, Any], kind: str, where: str) -> None:
    """Raises RowError for a completion without text, Dropped for other texts that are empty and for equal pairs."""
    for column in TEXT_COLUMNS[kind] if "messages" not in typed else ("messages",):
        value = typed[column]
        if not _is_empty(value):
            continue
        if column not in (*COMPLETIONS, "messages"):
            raise Dropped(EMPTY_TEXT, column)
        place = column if isinstance(value, str) else f"{column}[{len(value) - 1}]"
        raise RowError(where, place, EMPTY_COMPLETION, do=FILL)
    if kind in PAIRED and TEXT_COLUMNS[kind] and typed["chosen"] == typed["rejected"]:
        raise Dropped(EQUAL_PAIR, "rejected")


def _is_empty(value: str | list[Message]) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not value[-1]["content"].strip() and "tool_calls" not in value[-1]


def _check_margin(value: Any, where: str) -> None:
    """A number, or text of one as in CSV."""
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
    except (TypeError, ValueError):
        raise RowError(where, "margin", "must be a number", repr(value), FILL) from None
