"""Tools in rows: schemas of what may be called, calls in the assistant's messages, results in messages of their own.

In a dataset's file, `tools` and `tool_calls` are JSON text: every row may have other arguments, a column has one type.
So is `chat_template_kwargs`, the arguments of the chat template (`template_arguments.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stages.data.faults import RowError, what_is
from stages.data.types import Message, Row

TOOLS = "tools"
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
JSON_COLUMNS = (TOOLS, TEMPLATE_ARGUMENTS)
"""The columns of conversational rows that are JSON text in a dataset's file."""


def tool_schemas(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The schemas in a row's column `tools`: a list, or JSON text of one; None where there are none."""
    schemas = from_json(value, where, TOOLS)
    if not schemas:
        return None
    if not isinstance(schemas, list):
        raise RowError(where, TOOLS, "must be a list of tool schemas, or JSON text of one", what_is(schemas))
    for number, schema in enumerate(schemas):
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            reason = "a tool schema is an object with a name: {type: function, function: {name, parameters}}"
            raise RowError(where, f"{TOOLS}[{number}]", reason, json.dumps(schema, ensure_ascii=False)[:80])
    return schemas


def tool_calls(value: Any, where: str, place: str) -> list[dict[str, Any]]:
    """The calls of a message as {type: function, function: {name, arguments}}, with their id where they have one.

    Taken in that form or as {name, arguments}; arguments are an object, or JSON text of one.
    """
    calls = from_json(value, where, place)
    if not isinstance(calls, list):
        raise RowError(where, place, "must be a list of tool calls", what_is(calls))
    return [_call(call, where, f"{place}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, where: str, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        reason = "a tool call is an object with a name: {type: function, function: {name, arguments}}"
        raise RowError(where, place, reason, json.dumps(call, ensure_ascii=False)[:80])
    arguments = function.get("arguments")
    arguments = {} if arguments is None else from_json(arguments, where, f"{place}.arguments")
    if not isinstance(arguments, dict):
        reason = "arguments are an object, or JSON text of one"
        raise RowError(where, f"{place}.arguments", reason, what_is(arguments))
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made if call.get("id") is None else {"id": str(call["id"]), **made}


def from_json(value: Any, where: str, place: str) -> Any:
    """The value, or what its JSON text says; None for an empty one. Raises RowError where that is no JSON."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(where, place, "not JSON", f"{value[:40]!r}: {error}") from error


def stored(row: Row, columns: Sequence[str]) -> Row:
    """The row of a conversational dataset as its file has it. `columns`: those that hold messages."""
    changed: Row = {name: _json(row[name]) for name in JSON_COLUMNS if isinstance(row.get(name), list | dict)}
    for column in columns:
        if any("tool_calls" in message for message in row[column]):
            changed[column] = [_stored_message(message) for message in row[column]]
    return {**row, **changed} if changed else row


def read(row: Row, columns: Sequence[str]) -> Row:
    """The row as it was before `stored`; fields that only other rows' messages have are left out."""
    changed: Row = {column: [_read_message(message) for message in row[column]] for column in columns}
    changed |= {name: json.loads(row[name]) for name in JSON_COLUMNS if isinstance(row.get(name), str)}
    return {**row, **changed}


def _stored_message(message: Message) -> Message:
    calls = message.get("tool_calls")
    return message if calls is None or isinstance(calls, str) else {**message, "tool_calls": _json(calls)}


def _read_message(message: Message) -> Message:
    held = {name: value for name, value in message.items() if value is not None}
    if isinstance(held.get("tool_calls"), str):
        held["tool_calls"] = json.loads(held["tool_calls"])
    return held


def _json(value: Any) -> str:
    """Keys as they stand: templates write them in that order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
