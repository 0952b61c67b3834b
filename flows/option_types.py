"""What options accept, each with words for what it does not. Imports nothing of ours: `--help` needs none of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_SECONDS = 366 * 86400.0


def count(text: str) -> int:
    """A whole number of 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def port(text: str) -> int:
    """0 to 65535."""
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected the number of a port, 0 to 65535 (0: a free one), found {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, "a number above 0", lambda value: value > 0)


def not_negative(text: str) -> float:
    """A number of 0 or more."""
    return _number(text, "a number of 0 or more", lambda value: value >= 0)


def duration(text: str) -> float:
    """Seconds, of `90`, `90s`, `15m`, `6h` or `1d`."""
    forms = "expected a number of seconds, or one with its unit: 90s, 15m, 6h, 1d"
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{forms}; found {text!r}")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{forms}, of 366d at most; found {text!r}")
    return seconds


def place(text: str) -> Path | str:
    """A local path, or a URL as it stands."""
    return text if "://" in text else Path(text).expanduser()


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """One of these; the nearest is named."""

    def choose(text: str) -> str:
        if text in names:
            return text
        from stages.names import nearest

        raise argparse.ArgumentTypeError(f"expected {', '.join(names)}; found {text!r}{nearest(text, names)}")

    return choose


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (fits(value) and value < float("inf")):
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
    return value
