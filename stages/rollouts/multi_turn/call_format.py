"""Calls of tools in what a model writes, in the format of its own chat template.

Which format that is, the template says: a conversation with one call is rendered, and the reader that finds exactly
that call in it is the right one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from artifacts.errors import StageError
from stages.data.assistant import UnclearTurnError, assistant_spans


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    """Why it cannot be made; None: it is well formed."""
    id: str | None = None


@dataclass(frozen=True)
class Said:
    """A turn of the model: its words and its calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()


Read = Callable[[str, Sequence[int]], Said]
"""(a turn's text with its special tokens but without the end token, the token ids before it) -> what it says"""

UNREADABLE = "unreadable"
"""The name of a call that has none."""
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PYTHON, _CALLS, _ARGS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"


def tagged(text: str, _: Sequence[int] = ()) -> Said:
    """Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them."""
    calls = tuple(_call(found) for found in _TAGGED.findall(text))
    return Said(_TAGGED.sub("", text).strip() if calls else text, calls)


def json_turn(text: str, _: Sequence[int] = ()) -> Said:
    """Llama 3: the whole turn is {"name": ..., "parameters": {...}}."""
    body = text.strip().removeprefix(_PYTHON).strip()
    announced = text.strip().startswith(_PYTHON)
    call = _call(body) if announced or body.startswith("{") else None
    if call is None or (call.problem is not None and not announced):
        return Said(text)
    return Said("", (call,))


def listed(text: str, _: Sequence[int] = ()) -> Said:
    """Mistral: [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}, ...]."""
    content, mark, body = text.partition(_CALLS)
    if not mark:
        return Said(text)
    try:
        calls = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Said(content, (ToolCall(UNREADABLE, problem=f"not JSON: {error}"),))
    entries = calls if isinstance(calls, list) else [calls]
    return Said(content, tuple(map(_checked, entries)) or (ToolCall(UNREADABLE, problem="an empty list of calls"),))


def with_arguments(text: str, _: Sequence[int] = ()) -> Said:
    """Mistral since Small 3.2: [TOOL_CALLS]name[ARGS]{...}, any number of them."""
    content, *calls = text.split(_CALLS)
    return Said(content, tuple(map(_named, calls))) if calls else Said(text)


FORMATS: dict[str, Read] = {
    '<tool_call>{"name": ..., "arguments": ...}</tool_call>': tagged,
    '[TOOL_CALLS] [{"name": ..., "arguments": ...}]': listed,
    "[TOOL_CALLS]name[ARGS]{...}": with_arguments,
    '{"name": ..., "parameters": ...}': json_turn,
}

PROBE = ToolCall("probe_tool", {"probe_argument": "a value"}, id="probe0001")
_PROBED: list[dict[str, Any]] = [
    {"role": "user", "content": "a question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": PROBE.id, "type": "function", "function": {"name": PROBE.name, "arguments": PROBE.arguments}}
        ],
    },
]


def call_reader(tokenizer: Any, schemas: Sequence[Mapping[str, Any]] = ()) -> Read:
    """The reader of the tokenizer's format: its own `response_template` where it has one, else the one of FORMATS that
    reads what its chat template writes. Raises StageError where none does."""
    if getattr(tokenizer, "response_template", None) is not None:
        return _own_reader(tokenizer, schemas)
    turn = _probed_turn(tokenizer)
    # with and without the token that ends the turn
    texts = [turn, *(turn.removesuffix(token) for token in added_tokens(tokenizer) if turn.endswith(token))]
    for read in FORMATS.values():
        if any(_is_probe(read(text, ()).calls) for text in texts):
            return read
    raise StageError(
        f"the chat template writes a call of a tool as {turn!r:.200}, which is none of the formats that can be read: "
        f"{'; '.join(FORMATS)}; give the tokenizer a response_template, or another chat template"
    )


def _probed_turn(tokenizer: Any) -> str:
    """How the template writes the call of PROBE, with the end of the turn."""

    def render(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except Exception as error:  # the template is a program of somebody else
            raise UnclearTurnError(str(error)) from error

    try:
        ((start, stop),) = assistant_spans(_PROBED, render, added_tokens(tokenizer))
        return render(_PROBED, False)[start:stop].strip()
    except UnclearTurnError as error:
        raise StageError(
            f"the chat template takes no calls of tools ({error}); give a model whose template shows them"
        ) from error


def _is_probe(calls: Sequence[ToolCall]) -> bool:
    return [(call.name, call.arguments, call.problem) for call in calls] == [(PROBE.name, PROBE.arguments, None)]


def added_tokens(tokenizer: Any) -> list[str]:
    """The tokens that stand for themselves in a text."""
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def _own_reader(tokenizer: Any, schemas: Sequence[Mapping[str, Any]]) -> Read:
    def read(text: str, before: Sequence[int]) -> Said:
        try:
            message = tokenizer.parse_response(text, prefix=list(before), tools=[dict(one) for one in schemas] or None)
        except Exception as error:  # it reads by regular expressions and JSON of somebody else
            return Said(text, (ToolCall(UNREADABLE, problem=str(error)),))
        calls = message.get("tool_calls") or ()
        return Said(str(message.get("content") or ""), tuple(map(_checked, calls)))

    return read


def _named(text: str) -> ToolCall:
    """name[ARGS]{...}"""
    name, mark, body = text.partition(_ARGS)
    call = _call(f'{{"name": {json.dumps(name.strip())}, "arguments": {body}}}')
    return call if mark else ToolCall(name.strip() or UNREADABLE, problem=f"no {_ARGS} with arguments after the name")


def _call(text: str) -> ToolCall:
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as error:
        return ToolCall(UNREADABLE, problem=f"not JSON: {error}")


def _checked(call: Any) -> ToolCall:
    """From {name, arguments or parameters}, perhaps inside {type: function, function: ...}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return ToolCall(UNREADABLE, problem="a call is an object with name and arguments")
    name = function["name"]
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return ToolCall(name, problem=f"arguments are not JSON: {error}")
    if arguments is not None and not isinstance(arguments, dict):
        return ToolCall(name, problem="arguments must be an object")
    given = call.get("id")
    return ToolCall(name, arguments or {}, id=given if isinstance(given, str) else None)
