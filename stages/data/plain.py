"""Values of tables and of users' functions as JSON has them; what it has no form for, by the field that holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from math import isinf, isnan
from typing import Any

from stages.data.faults import RowError, what_is

_CONVERT = "convert it, or name the columns to keep in keep_columns"


class _UnfitError(Exception):
    """JSON has no form for a value."""

    def __init__(self, reason: str, found: str, do: str) -> None:
        super().__init__(reason)
        self.reason, self.found, self.do = reason, found, do


def plain(row: Mapping[str, Any], where: str, *, digest_binary: bool = False) -> dict[str, Any]:
    """The row as JSON has it: dates and decimals as text, NaN (a gap, in tables) as null.

    digest_binary: bytes as their SHA-256, for digests over rows with columns that nobody keeps.
    Raises RowError for infinities, half surrogates and anything JSON has no form for.
    """
    made = {}
    for name, value in row.items():
        try:
            made[_key(name)] = _plain(value, digest_binary)
        except _UnfitError as error:
            say_drop = error.do != _CONVERT  # of a column of bytes every row has some
            raise RowError(where, str(name), error.reason, error.found, error.do, say_drop=say_drop) from None
    return made


def _plain(value: Any, digest_binary: bool) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value if value.isascii() else _unicode(value)
    if isinstance(value, float):
        if isinf(value):
            raise _UnfitError("a number must be finite", str(value), "write null")
        return None if isnan(value) else value
    if isinstance(value, dict):
        return {_key(name): _plain(entry, digest_binary) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, digest_binary) for entry in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes) and digest_binary:
        return hashlib.sha256(value).hexdigest()
    raise _UnfitError("a dataset keeps text, numbers, true/false, lists and objects", what_is(value), _CONVERT)


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise _UnfitError("keys are text", repr(name), "write it as text")
    return name


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnfitError(
            "half of a surrogate pair (\\ud800 to \\udfff alone)", ascii(text)[:40], "remove it"
        ) from None
    return text
