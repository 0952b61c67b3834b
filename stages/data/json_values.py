"""Values of rows as JSON has them."""

from __future__ import annotations

import hashlib
from datetime import date, datetime, time
from decimal import Decimal
from math import isinf, isnan
from typing import Any

from artifacts.errors import DataError
from stages.data.faults import what_is


def plain(value: Any, where: str, *, digest_binary: bool = False) -> Any:
    """The value as JSON has it: dates and decimals as text, NaN (a gap, in tables) as null.

    digest_binary: bytes as their SHA-256, for digests over rows with columns that nobody keeps.
    Raises DataError for infinities, half surrogates and anything JSON has no form for.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        if not value.isascii():
            _require_unicode(value, where)
        return value
    if isinstance(value, float):
        if isinf(value):
            raise DataError(f"{where} holds an infinite number; write null")
        return None if isnan(value) else value
    if isinstance(value, dict):
        return {_key(name, where): plain(entry, where, digest_binary=digest_binary) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, where, digest_binary=digest_binary) for entry in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes) and digest_binary:
        return hashlib.sha256(value).hexdigest()
    raise DataError(
        f"{where} holds {what_is(value)}; a dataset keeps text, numbers, true/false, lists and objects: "
        f"convert it, or name the columns to keep in keep_columns"
    )


def _key(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise DataError(f"{where} has the key {name!r}; keys are text")
    return name


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff alone); remove it") from error
