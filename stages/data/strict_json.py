"""JSON as a dataset may hold it: what Python's parser lets pass and later stages choke on is refused here.

Refused: NaN and infinities (also 1e999), a key twice in one object, lone surrogates. Lines end at \\n only:
`splitlines` would cut at U+2028 and U+0085, which JSON allows inside strings.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from typing import IO, Any

from artifacts.errors import DataError
from stages.data.faults import what_is

_WIDE = (BOM_UTF16_LE, BOM_UTF16_BE)
LONGEST_LINE_BYTES = 256 << 20
LONGEST_NUMBER = 4000
"""Digits of a whole number; Python reads a few more."""


class JsonError(DataError):
    """Something is no JSON, or none that a dataset may hold. `reason` is the same wherever there is that fault;
    `of_the_file`: other lines have it too, most likely."""

    def __init__(self, where: str, reason: str, said: str, *, of_the_file: bool = False) -> None:
        """`said` goes on where the place ends: ` is not JSON`, `: NaN is not JSON`."""
        self.reason, self.said, self.of_the_file = reason, said, of_the_file
        super().__init__(f"{where}{said}")


def parse(data: bytes, where: str) -> Any:
    """The value in `data`. Raises JsonError naming `where`."""
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
        wide = data.startswith(_WIDE)
        found = "it looks like UTF-16" if wide else f"{error.reason} at byte {error.start}"
        raise JsonError(where, "not UTF-8", f" is not UTF-8 ({found}); convert the file", of_the_file=wide) from error
    except UnicodeEncodeError as error:
        said = " has half of a surrogate pair (\\ud800 to \\udfff alone); remove it"
        raise JsonError(where, "half of a surrogate pair", said) from error
    except json.JSONDecodeError as error:
        found, hint = _excerpt(error.doc, error.pos), _hint(error)
        said = f" is not JSON: {error.msg} at character {error.pos + 1}{found}{hint}"
        raise JsonError(where, "not JSON", said, of_the_file=bool(hint)) from error
    except RecursionError as error:
        raise JsonError(where, "nested too deeply", " is nested too deeply") from error
    except _RefusedError as error:
        raise JsonError(where, error.reason, f": {error}") from error
    return value


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`. Raises JsonError when it holds anything else."""
    value = parse(data, where)
    if not isinstance(value, dict):
        raise JsonError(where, *no_object(value))
    return value


def no_object(value: Any) -> tuple[str, str]:
    """(reason, what is said) of something that is no row."""
    return "not an object", f" is {what_is(value)}, not an object; each row is {{column: value}}"


def lines(stream: IO[bytes], where: str) -> Iterator[bytes]:
    """The lines without their \\n. Raises DataError for one without end."""
    number = 0
    while line := stream.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES:
            raise DataError(f"{where} row {number} is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        yield line.removesuffix(b"\n")


class _RefusedError(ValueError):
    """A value that JSON parsers accept and a dataset does not."""

    def __init__(self, reason: str, said: str) -> None:
        self.reason = reason
        super().__init__(said)


def _refuse_constant(name: str) -> Any:
    raise _RefusedError("no number of JSON", f"{name} is not JSON; write null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError("a number too large", f"the number {text} is too large; write null or text")
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        said = f"the number {text[:20]}... has {len(text)} digits; write text"
        raise _RefusedError("a number of too many digits", said)
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _RefusedError("a key twice", f"the key {double!r} occurs twice in one object; keep one")
    return found


def _hint(error: json.JSONDecodeError) -> str:
    """What the text most likely is instead, and what to do about it."""
    if "BOM" in error.msg:
        return "; a byte order mark stands before the row: remove it, or save the file as plain UTF-8"
    if error.doc.startswith("{'"):
        return '; this is how Python prints a dict: write rows with json.dumps, which puts "..." around text'
    if error.doc.lstrip().startswith("["):
        return "; this looks like one list over several lines: set `format: json` of the source"
    return ""


def _excerpt(text: str, position: int) -> str:
    found = text[max(0, position - 10) : position + 20]
    return f", near {found!r}" if found.strip() else ""
