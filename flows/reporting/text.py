"""How numbers, times and values are written on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from stages.visible import visible

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
"""Whatever the machine's language is."""
MAX_TEXT = 4_000
"""Characters of one prompt or completion that the page holds."""


def number(value: object) -> str:
    """At most four significant digits for floats, thousands separated for integers, other values as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return plain(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        written = f"{value:,.{digits}f}"
        return written.rstrip("0").rstrip(".") if digits else written
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: object) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `1 h 5 min`."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(written: object) -> str:
    """`29 Nov 2026, 13:40 UTC` of an ISO time with its zone; other texts as they are."""
    try:
        at = datetime.fromisoformat(str(written))
    except ValueError:
        return plain(written)
    zone = "" if at.tzinfo is None else " UTC"
    at = at if at.tzinfo is None else at.astimezone(UTC)
    return f"{at.day} {MONTHS[at.month - 1]} {at.year}, {at.hour:02}:{at.minute:02}{zone}"


def short(identifier: str) -> str:
    """The first ten digits of an id or fingerprint; other references as they are."""
    digest = identifier.removeprefix("sha256:")
    is_digest = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return digest[:10] if is_digest else identifier


def plain(value: object) -> str:
    """A value in one line: strings as they are, all else as JSON; nothing in it steers a terminal."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return repr(value)
    return visible(json.dumps(value, ensure_ascii=False, default=str))


def in_words(value: object) -> str:
    """Nested JSON in a line of words: `name: value · name: value`, digests shortened, empty values left out."""
    if isinstance(value, Mapping):
        return " · ".join(f"{name}: {words}" for name, inner in value.items() if (words := in_words(inner)))
    if isinstance(value, list):
        return "; ".join(filter(None, map(in_words, value)))
    return short(plain(value)) if isinstance(value, str) else number(value)


def with_intervals(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`x`, `x/low` and `x/high` of a run's record as one metric with its interval; others as they are."""
    edges = {f"{name}/{edge}" for name in metrics for edge in ("low", "high")} & set(metrics)
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if {f"{name}/low", f"{name}/high"} <= edges:
            found[name] = {"value": value, "low": metrics[f"{name}/low"], "high": metrics[f"{name}/high"]}
        elif name not in edges:
            found[name] = value
    return found


def clipped(text: str, limit: int = MAX_TEXT) -> str:
    """The text, cut at `limit` characters with a word on how much is missing."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def turns(value: Any) -> list[tuple[str, str]]:
    """(role, text) of a prompt or completion; role is empty for plain text."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return [(plain(turn["role"]), clipped(plain(turn.get("content", "")))) for turn in value]
    return [("", clipped(plain(value)))]
