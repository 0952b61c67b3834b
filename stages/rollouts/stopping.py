"""Where a completion ends: at an end token, at its limit, or where its text has come to hold a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""

_FIRST_WINDOW = 16
"""Tokens at the end of a completion that are decoded first."""
_SLACK = 8
"""Characters that may look different where a window cuts into a word."""


def completes(token_ids: Sequence[int], stop_strings: Sequence[str], decode: Decode) -> bool:
    """Whether the text of the tokens holds a stop string, given that it held none before the last token.

    Such a string ends within the last token's text, so the tokens at the end tell.
    """
    longest = max(map(len, stop_strings))
    last = len(decode(token_ids[-1:]))
    window = _FIRST_WINDOW
    while True:
        text = decode(token_ids[-window:])
        if holds(text, stop_strings):
            return window >= len(token_ids) or holds(decode(token_ids), stop_strings)
        if window >= len(token_ids) or len(text) >= longest + last + _SLACK:
            return False
        window *= 2


def holds(text: str, stop_strings: Sequence[str]) -> bool:
    """Whether one of the strings is in the text."""
    return any(stop in text for stop in stop_strings)


def text_before(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
