"""Text of models and of data as it may be shown: it cannot steer a terminal."""

from __future__ import annotations

import re

_STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")
"""Control characters (C0, DEL, C1) but tabs and ends of lines, what turns the direction of a line, and halves of
characters, which cannot be written at all."""


def visible(text: str) -> str:
    """The text with each of these written out, as `\\u001b`. JSON stays the same JSON."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
