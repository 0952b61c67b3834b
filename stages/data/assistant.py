"""Where the assistant speaks in a rendered conversation, for any chat template, from how it renders other texts.

A turn's own text is what changes when its content and the arguments of its tool calls change, and what the template
writes around them because they are there. It is trained from where the template would have asked for it (its
generation prompt), up to and with the token that ends the turn: the first of the tokenizer's added tokens after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, with the generation prompt) -> text. Raises UnclearTurnError where the template refuses them."""
Span = tuple[int, int]
_PRIVATE_USE = range(0xE000, 0xF8FF)
"""Characters that mean nothing by themselves; one that a conversation does not hold stands in for a turn's text."""


class UnclearTurnError(Exception):
    """The template does something with a turn that cannot be followed."""


def assistant_spans(messages: Sequence[Mapping[str, Any]], render: Render, added_tokens: Sequence[str]) -> list[Span]:
    """Character spans of all assistant turns in `render(messages, False)`, in order, each with its end-of-turn token.

    Raises UnclearTurnError naming the message where the template hides a turn or mixes it with others.
    """
    text = render(messages, False)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = _Turn(messages, index, text, render)
        start, stop = turn.start(), turn.stop(added_tokens)
        if spans and start < spans[-1][1]:
            raise UnclearTurnError(f"message {index}: its text and that of an earlier turn overlap")
        spans.append((start, stop))
    return spans


def with_ends(marked: Sequence[Span], turns: Sequence[Span], text: str, added_tokens: Sequence[str]) -> list[Span]:
    """The spans that a template marks, with the end-of-turn token where they stop just before it."""
    ends = {}
    for start, stop in turns:
        last = max((span for span in marked if start < span[1] < stop), default=None)
        if last is not None and text[last[1] : stop].strip() in added_tokens:
            ends[last] = stop
    return [(span[0], ends.get(span, span[1])) for span in marked]


def inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token shares a character with one of the spans (both in order)."""
    mask = []
    position = 0
    for start, stop in offsets:
        while position < len(spans) and spans[position][1] <= start:
            position += 1
        mask.append(position < len(spans) and start < stop and stop > spans[position][0])
    return mask


class _Turn:
    """One assistant message in the rendered conversation, beside the conversation that ends with it."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], index: int, text: str, render: Render) -> None:
        self.messages, self.index, self.text, self.render = messages, index, text, render
        self.mark = next(mark for code in _PRIVATE_USE if (mark := chr(code)) not in text)
        self.shown = self._variable(messages, text)
        self.ending, self.shown_last = text, self.shown
        if index + 1 < len(messages):
            self.ending = render(messages[: index + 1], False)
            self.shown_last = self._variable(messages[: index + 1], self.ending)
        self.body = self._body()

    def start(self) -> int:
        """From where the turn is trained."""
        asked = self._asked()
        if asked is not None:
            return asked
        before = self.ending[self.body[0] : self.shown_last[0]]
        if not self.text[: self.shown[0]].endswith(before):
            raise self._unclear(
                "the template writes what precedes its text in another way once the conversation goes on"
            )
        return self.shown[0] - len(before)

    def stop(self, added_tokens: Sequence[str]) -> int:
        """Up to where the turn is trained."""
        after = self.ending[self.shown_last[1] : self.body[1]]
        if not self.text.startswith(after, self.shown[1]):
            raise self._unclear(
                "the template writes what follows its text in another way once the conversation goes on"
            )
        stop = self.shown[1] + len(after)
        closing = self.ending[self.body[1] :]
        return stop + _end_of_turn(closing[: common_length(closing, self.text[stop:])], added_tokens)

    def _variable(self, messages: Sequence[Mapping[str, Any]], text: str) -> Span:
        """Where `text` differs from the rendering with another content and other arguments in that message."""
        marks, other = _with_marks(messages[self.index], self.mark)
        changed = self.render(_replaced(messages, self.index, other), False)
        for mark, name in marks.items():
            if changed.count(mark) != 1:
                how = "shows its {} more than once" if mark in changed else "does not show its {}"
                raise self._unclear(f"the template {how.format(name)}")
        return _difference(text, changed)

    def _body(self) -> Span:
        """Where the conversation that ends with this turn differs from one in which the turn is one other text."""
        message = self.messages[self.index]
        if not _further(message):
            return self.shown_last
        plain = {"role": message["role"], "content": self.mark * 2}
        changed = self.render(_replaced(self.messages[: self.index + 1], self.index, plain), False)
        return _difference(self.ending, changed)

    def _asked(self) -> int | None:
        """Where the template would have asked for this turn; None where that place cannot be seen."""
        if self.index == 0:
            return None
        asked = self.render(self.messages[: self.index], True)
        if self.text.startswith(asked) and len(asked) <= self.shown[0]:
            return len(asked)
        return self._asked_behind_the_message_before()

    def _asked_behind_the_message_before(self) -> int | None:
        """For templates that write an earlier part of the conversation in another way once it goes on."""
        before = self.index - 1
        marked = _replaced(self.messages, before, {**self.messages[before], "content": self.mark * 2})
        whole, asked = self.render(marked, False), self.render(marked[: self.index], True)
        rest, prompt = whole.rpartition(self.mark)[2], asked.rpartition(self.mark)[2]
        if self.mark not in whole or self.mark not in asked or not self.text.endswith(rest):
            return None
        end_of_message = len(self.text) - len(rest)
        if end_of_message > self.shown[0]:
            raise self._unclear("its text and that of the message before overlap")
        place = end_of_message + len(prompt)
        return place if rest.startswith(prompt) and place <= self.shown[0] else None

    def _unclear(self, reason: str) -> UnclearTurnError:
        return UnclearTurnError(f"message {self.index}: {reason}")


def _with_marks(message: Mapping[str, Any], mark: str) -> tuple[dict[str, str], dict[str, Any]]:
    """({mark: what it stands for}, the message with marks as its content and as the arguments of its tool calls)."""
    calls = message.get("tool_calls") or []
    marks: dict[str, str] = {}
    other = dict(message)
    if message.get("content") or not calls:
        other["content"] = mark * 2
        if not calls:  # beside tool calls, templates may leave it out
            marks[mark * 2] = "content"
    if calls:
        own = [f"{mark}{number}{mark}" for number in range(len(calls))]
        marks |= dict.fromkeys(own, "tool calls")
        other["tool_calls"] = [_with_arguments(call, one) for call, one in zip(calls, own, strict=True)]
    return marks, other


def _with_arguments(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The tool call with other arguments, in the form that its own have."""
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], mark)}
    arguments: Any = {mark: ""}
    if isinstance(call.get("arguments"), str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": arguments}


def _further(message: Mapping[str, Any]) -> bool:
    """Whether the message has more than role and content."""
    return any(value is not None for name, value in message.items() if name not in ("role", "content"))


def _replaced(messages: Sequence[Mapping[str, Any]], index: int, other: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*messages[:index], other, *messages[index + 1 :]]


def _difference(text: str, changed: str) -> Span:
    """The part of `text` that `changed` has in another way, or the place where `changed` has more."""
    start = common_length(text, changed)
    behind = common_length(text[start:][::-1], changed[start:][::-1])
    return start, len(text) - behind


def _end_of_turn(closing: str, added_tokens: Sequence[str]) -> int:
    """Length up to and with the first added token; all of it where there is none."""
    found = [(closing.find(token), token) for token in added_tokens if token and token in closing]
    if not found:
        return len(closing)
    place, token = min(found, key=lambda one: (one[0], -len(one[1])))
    return place + len(token)


def common_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    low, high = 0, shorter  # they part between low and high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
