"""Values of tables and of users' functions as JSON has them; what it has no form for, by the field that holds it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from math import isinf, isnan
from typing import Any

from stages.data.faults import RowError, what_is

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_CONVERT = "convert it, or name the columns to keep in keep_columns"


class _UnfitError(Exception):
    """JSON has no form for a value."""

    def __init__(self, reason: str, found: str, do: str) -> None:
        super().__init__(reason)
        self.reason, self.found, self.do = reason, found, do


Unfit = Callable[[Any, _UnfitError], Any]
"""What stands for a value that JSON has no form for; it may raise the error instead."""


def plain(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row as JSON has it: dates and decimals as text, NaN (a gap, in tables) as null.

    Raises RowError for infinities, half surrogates and anything JSON has no form for.
    """
    made = {}
    for name, value in row.items():
        try:
            made[_key(name, _refuse)] = _plain(value, _refuse)
        except _UnfitError as error:
            say_drop = error.do != _CONVERT  # of a column of bytes every row has some
            raise RowError(where, str(name), error.reason, error.found, error.do, say_drop=say_drop) from None
    return made


def digestible(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The same of any row, for digests over columns that perhaps nobody keeps: where JSON has no form for a value, its
    SHA-256 stands."""
    return {_key(name, _digest): _plain(value, _digest) for name, value in row.items()}


def _refuse(value: Any, error: _UnfitError) -> Any:
    raise error


def _digest(value: Any, _: _UnfitError) -> str:
    """Of bytes, or of what Python shows of the value, without what is another in every process: addresses, the order
    of sets."""
    if not isinstance(value, bytes):
        shown = sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)
        value = _ADDRESS.sub("", f"{type(value).__name__} {shown}").encode("utf-8", "backslashreplace")
    return hashlib.sha256(value).hexdigest()


def _plain(value: Any, unfit: Unfit) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value if value.isascii() else _unicode(value, unfit)
    if isinstance(value, float):
        if isinf(value):
            return unfit(value, _UnfitError("a number must be finite", str(value), "write null"))
        return None if isnan(value) else value
    if isinstance(value, dict):
        return {_key(name, unfit): _plain(entry, unfit) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, unfit) for entry in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    reason = "a dataset keeps text, numbers, true/false, lists and objects"
    return unfit(value, _UnfitError(reason, what_is(value), _CONVERT))


def _key(name: Any, unfit: Unfit) -> str:
    if isinstance(name, str):
        return name
    return str(unfit(name, _UnfitError("keys are text", repr(name), "write it as text")))


def _unicode(text: str, unfit: Unfit) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        reason = "half of a surrogate pair (\\ud800 to \\udfff alone)"
        return str(unfit(text, _UnfitError(reason, ascii(text)[:40], "remove it")))
    return text
