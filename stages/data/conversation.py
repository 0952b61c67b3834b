"""Conversations in the forms people keep them in, as lists of {role, content}; and what makes one valid.

A message of the assistant may also have `tool_calls`, one of a tool `name` and `tool_call_id`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from stages.data.faults import RowError, what_is
from stages.data.strict_json import JsonError, parse
from stages.data.tools import tool_calls
from stages.data.types import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Names of the speakers in ShareGPT, OpenAssistant and other collections."""

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def from_json_text(text: str, where: str, name: str) -> list[Any]:
    """The list of messages that a column of a table holds as JSON text. Raises RowError where it is none."""
    reason = "must be a list of messages, or JSON text of one"
    do = "write it with json.dumps, or make messages of it in source.function"
    try:
        messages = parse(text.encode("utf-8", "surrogatepass"), where)
    except JsonError as error:
        raise RowError(where, name, reason, f"text {text[:40]!r}", do) from error
    if not isinstance(messages, list):
        raise RowError(where, name, reason, f"JSON text of {what_is(messages)}", do)
    return messages


def is_transcript(text: str) -> bool:
    """`Human: ... \\n\\nAssistant: ...`, as Anthropic's hh-rlhf has it."""
    found = _SPEAKER.findall(text)
    return bool(found) and found[0] == "Human" and "Assistant" in found and _SPEAKER.match(text) is not None


def from_transcript(text: str, where: str, column: str) -> list[Message]:
    """The turns of a transcript, white space around each removed.

    A last `Assistant:` with nothing after it is where the answer goes; the caller sees an empty last turn.
    """
    pieces = _SPEAKER.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError(where, column, "no Human:/Assistant: transcript as in the rows before it", repr(text[:40]))
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def from_messages(value: Sequence[Any], where: str, column: str) -> tuple[list[Message], list[str]]:
    """(messages, names of the fields left out) from role/content or from/value turns."""
    messages, left_out = [], set()
    for number, turn in enumerate(value, 1):
        place = f"{column}[{number - 1}]"
        if not isinstance(turn, dict):
            raise RowError(where, place, "a message is an object with role and content", what_is(turn))
        speaker, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        calls = turn.get("tool_calls") or None
        for name in (speaker, content) if calls is None else (speaker,):
            if name not in turn:
                raise RowError(where, place, f"a message has no {name!r}", f"keys {', '.join(turn) or 'none'}")
        role = ROLES.get(str(turn[speaker]).lower())
        if role is None:
            raise RowError(
                where, place, "unknown role", repr(turn[speaker]), f"roles are {', '.join(dict.fromkeys(ROLES))}"
            )
        text = _text("" if calls and turn.get(content) is None else turn[content], where, place)
        message: Message = {"role": role, "content": text}
        if calls is not None:
            if role != "assistant":
                raise RowError(where, f"{place}.tool_calls", "only the assistant calls tools", f"a message of {role}")
            message["tool_calls"] = tool_calls(calls, where, f"{place}.tool_calls")
        if role == "tool":
            message |= {name: str(turn[name]) for name in ("name", "tool_call_id") if turn.get(name) is not None}
        known = {speaker, content, "tool_calls", *message}
        left_out |= {name for name, held in turn.items() if name not in known and held is not None}
        messages.append(message)
    return messages, sorted(left_out)


def _text(content: Any, where: str, place: str) -> str:
    """The content of a message: text, or parts of text, joined as chat templates join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RowError(where, place, "a message's content must be text", what_is(content))
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and not isinstance(part.get("text"), str):
            raise RowError(where, f"{place}.content[{number}]", "a part of text has no text")
        if kind != "text":
            reason = "images, videos and sound are not supported: a message's content must be text, or parts of text"
            found = f"a part of type {kind}" if kind else what_is(part)
            raise RowError(where, f"{place}.content[{number}]", reason, found, "leave it out where the text says all")
        texts.append(part["text"])
    return "".join(texts)


def check_order(messages: Sequence[Message], where: str, column: str, *, begins: str, ends: str) -> None:
    """Raises RowError unless user and assistant take turns, from `begins` to `ends`; a system message may lead.

    The results of the assistant's tool calls stand between its call and its next message; a conversation that ends
    with the user may end with them, and a completion (begins with the assistant) with a call.
    """
    if not messages:
        raise RowError(where, column, "a conversation without messages")
    turns = [message["role"] for message in messages]
    leading = 1 if turns[0] == "system" and begins == "user" else 0
    spoken = messages[leading:]
    shown = ", ".join(turns)
    if not spoken or spoken[0]["role"] != begins:
        do = f"leave out what stands before the {begins}'s first message"
        raise RowError(where, column, f"wrong role order: it must begin with the {begins}", shown, do)
    due: list[str | None] = []
    for number, message in enumerate(spoken):
        place = f"{column}[{number + leading}]"
        before = spoken[number - 1]["role"] if number else None
        if message["role"] == "tool":
            due = _answered(due, message, where, place)
        elif due:
            raise RowError(where, f"{column}[{number + leading - 1}]", MISSING_RESULT, shown)
        elif before == message["role"] or message["role"] == "system" or (before, message["role"]) == ("tool", "user"):
            reason = "wrong role order: user and assistant take turns after at most one system message"
            raise RowError(where, column, reason, shown, ONE_SYSTEM if message["role"] == "system" else JOIN)
        else:
            due = [call.get("id") for call in message.get("tool_calls", ())]
    last = spoken[-1]["role"]
    if due and (last == "tool" or begins == "user"):
        do = "leave the row out, or give type prompt_completion, whose completion may be a call"
        raise RowError(where, f"{column}[{len(messages) - 1}]", MISSING_RESULT, shown, do)
    if last != ends and (last, ends) != ("tool", "user"):
        raise RowError(where, column, f"the conversation does not end with the {ends}", shown, CUT)


CUT = "cut what stands after its last message"
ONE_SYSTEM = "keep one system message, at the start"
JOIN = "join messages of one role that follow each other"
MISSING_RESULT = "a tool call without its result"


def _answered(due: list[str | None], message: Message, where: str, place: str) -> list[str | None]:
    """The ids of the calls that still wait for a result."""
    if not due:
        raise RowError(where, place, "a tool's result without a tool call before it")
    identity = message.get("tool_call_id")
    if identity is None or None in due:
        return due[1:]
    if identity not in due:
        raise RowError(where, place, "a tool's result for a call that was not made", f"tool_call_id {identity!r}")
    return [call for call in due if call != identity]


def common_prompt(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Number of leading messages that the two share, up to the last one of the user's among them."""
    shared = 0
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            break
        if one["role"] == "user":
            shared = index + 1
    return shared


def common_text(first: str, second: str) -> int:
    """Where two completions part, in characters: a space before that point belongs to the completions (TRL)."""
    pairs = enumerate(zip(first, second, strict=False))
    # where one text begins with the other, the last character they share is left for the completions
    index = next((index for index, (one, other) in pairs if one != other), max(min(len(first), len(second)) - 1, 0))
    return index - 1 if index and first[index - 1] == " " else index
