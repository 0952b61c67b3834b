"""JSON as a dataset may hold it: what Python's parser lets pass and later stages choke on is refused here.

Refused: NaN and infinities (also 1e999), a key twice in one object, lone surrogates. Lines end at \\n only:
`splitlines` would cut at U+2028 and U+0085, which JSON allows inside strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import IO, Any

from artifacts.errors import DataError
from stages.data.faults import what_is

LONGEST_LINE_BYTES = 256 << 20
LONGEST_NUMBER = 4000
"""Digits of a whole number; Python reads a few more."""


def parse(data: bytes, where: str) -> Any:
    """The value in `data`. Raises DataError naming `where`."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique_keys,
        )
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff alone); remove it") from error
    except json.JSONDecodeError as error:
        found = _excerpt(error.doc, error.pos)
        raise DataError(
            f"{where} is not JSON: {error.msg} at character {error.pos + 1}{found}{_hint(error)}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply") from error
    except _RefusedError as error:
        raise DataError(f"{where}: {error}") from error
    return value


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`. Raises DataError when it holds anything else."""
    value = parse(data, where)
    if not isinstance(value, dict):
        raise DataError(f"{where} is {what_is(value)}, not an object; each row is {{column: value}}")
    return value


def lines(stream: IO[bytes], where: str) -> Iterator[bytes]:
    """The lines without their \\n. Raises DataError for an empty line and for one without end."""
    number = 0
    while line := stream.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES:
            raise DataError(f"{where} row {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        if not line.strip():
            raise DataError(f"{where} row {number} is an empty line; remove it")
        yield line.removesuffix(b"\n")


class _RefusedError(ValueError):
    """A value that JSON parsers accept and a dataset does not."""


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is not JSON; write null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {text} is too large; write null or text")
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise _RefusedError(f"the number {text[:20]}... has {len(text)} digits; write text")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"the key {double!r} occurs twice in one object; keep one")
    return found


def _hint(error: json.JSONDecodeError) -> str:
    """What the text most likely is instead, and what to do about it."""
    if "BOM" in error.msg:
        return "; the file starts with a byte order mark: save it as plain UTF-8"
    if error.doc.startswith("{'"):
        return '; this is how Python prints a dict: write rows with json.dumps, which puts "..." around text'
    if error.doc.lstrip().startswith("["):
        return "; this looks like one list over several lines: set `format: json` of the source"
    return ""


def _excerpt(text: str, position: int) -> str:
    found = text[max(0, position - 10) : position + 20]
    return f", near {found!r}" if found.strip() else ""
