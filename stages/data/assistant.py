"""Where the assistant speaks in a rendered conversation, for any chat template, from how it renders other texts.

A turn's own text is what changes when its content changes. It is trained from where the template would have asked for
it (its generation prompt), or from its first changed character where the template does not put it there, up to and
with the token that ends the turn: the first of the tokenizer's added tokens after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stages.data.types import Message

Render = Callable[[Sequence[Message], bool], str]
"""(messages, with the generation prompt) -> text."""
Span = tuple[int, int]
_PRIVATE_USE = range(0xE000, 0xF8FF)
"""Characters that mean nothing by themselves; one that a conversation does not hold stands in for a turn's text."""


class UnclearTurnError(Exception):
    """The template does something with a turn that cannot be followed."""


def assistant_spans(messages: Sequence[Message], render: Render, added_tokens: Sequence[str]) -> list[Span]:
    """Character spans of all assistant turns in `render(messages, False)`, in order, each with its end-of-turn token.

    Raises UnclearTurnError naming the message where the template hides a turn or mixes it with others.
    """
    text = render(messages, False)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = _own_text(messages, index, text, render)
        prompt = render(messages[:index], True) if index else ""
        if text.startswith(prompt) and (spans[-1][1] if spans else 0) <= len(prompt) <= start:
            start = len(prompt)
        closing = _closing(messages, index, text[stop:], render)
        stop += _end_of_turn(closing, added_tokens)
        if spans and start < spans[-1][1]:
            raise UnclearTurnError(f"message {index}: its text and that of an earlier turn overlap")
        spans.append((start, stop))
    return spans


def _own_text(messages: Sequence[Message], index: int, text: str, render: Render) -> Span:
    """Where `text` differs from the rendering with another content of that message."""
    other = next(mark for code in _PRIVATE_USE if (mark := chr(code)) not in text) * 2
    changed = render([*messages[:index], {**messages[index], "content": other}, *messages[index + 1 :]], False)
    start = common_length(text, changed)
    behind = common_length(text[start:][::-1], changed[start:][::-1])
    stop = len(text) - behind
    if other not in changed[start : len(changed) - behind]:
        raise UnclearTurnError(f"message {index}: the template does not show its content")
    return start, stop


def _closing(messages: Sequence[Message], index: int, rest: str, render: Render) -> str:
    """What the template writes after the turn, before anything of the next: common to this conversation and to the
    one that ends here."""
    ending = render(messages[: index + 1], False)
    _, stop = _own_text(messages[: index + 1], index, ending, render)
    return rest[: common_length(rest, ending[stop:])]


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
