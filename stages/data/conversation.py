"""Conversations in the forms people keep them in, as lists of {role, content}; and what makes one valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from artifacts.errors import DataError
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
}
"""Names of the speakers in ShareGPT, OpenAssistant and other collections."""

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


class RowError(DataError):
    """A row is wrong. `reason` is the same for every row with that fault; `detail` names no path."""

    def __init__(self, where: str, column: str, reason: str, found: str = "", do: str = "") -> None:
        self.reason = reason
        text = f"field {column!r}: {reason}"
        self.detail = "; ".join(part for part in (text, found and f"found {found}", do) if part)
        super().__init__(f"{where}: {self.detail}")


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
    """(messages of role and content, names of the fields left out) from role/content or from/value turns."""
    messages, left_out = [], set()
    for number, turn in enumerate(value, 1):
        place = f"{column}[{number - 1}]"
        if not isinstance(turn, dict):
            raise RowError(where, place, "a message is an object with role and content", type(turn).__name__)
        speaker, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        for name in (speaker, content):
            if name not in turn:
                raise RowError(where, place, f"a message has no {name!r}", f"keys {', '.join(turn) or 'none'}")
        role = ROLES.get(str(turn[speaker]).lower())
        if role is None:
            raise RowError(
                where, place, "unknown role", repr(turn[speaker]), f"roles are {', '.join(dict.fromkeys(ROLES))}"
            )
        if not isinstance(turn[content], str):
            raise RowError(where, place, "a message's content must be text", f"a {type(turn[content]).__name__}")
        left_out |= {name for name, held in turn.items() if name not in (speaker, content) and held is not None}
        messages.append({"role": role, "content": turn[content]})
    return messages, sorted(left_out)


def check_order(messages: Sequence[Message], where: str, column: str, *, begins: str, ends: str) -> None:
    """Raises RowError unless user and assistant take turns, from `begins` to `ends`; a system message may lead."""
    if not messages:
        raise RowError(where, column, "a conversation without messages")
    turns = [message["role"] for message in messages]
    spoken = turns[1:] if turns[0] == "system" and begins == "user" else turns
    shown = ", ".join(turns)
    if not spoken or spoken[0] != begins:
        raise RowError(where, column, f"wrong role order: it must begin with the {begins}", shown)
    for one, other in pairwise(spoken):
        if one == other or "system" in (one, other):
            reason = "wrong role order: user and assistant take turns after at most one system message"
            raise RowError(where, column, reason, shown)
    if spoken[-1] != ends:
        raise RowError(where, column, f"the conversation does not end with the {ends}", shown, "cut or leave it out")


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
