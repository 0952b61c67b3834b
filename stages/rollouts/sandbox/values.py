"""Values that leave the sandbox as data, and the comparison of such data with what was expected.

The form: JSON's null, true, false, numbers, strings and arrays (a list) for themselves; what JSON has not, as an object
with one member: {"tuple": [...]}, {"set": [...]}, {"dict": [[key, value], ...]}, {"bytes": hex}, {"int": hex} for large
numbers, {"float": text} for infinities and NaN, {"complex": [real, imaginary]}. An object of a subclass becomes what
its base class holds; anything else is no data. So nothing that a program defines takes part in a comparison.
"""

from __future__ import annotations

import json
import math
from typing import Any

DEPTH = 64
"""Of containers in containers."""
LARGE = 2**63


class NotData(ValueError):
    """A value that is not made of plain data."""


def encode(value: Any, depth: int = DEPTH) -> Any:
    """A value in the form above. Raises NotData."""
    if value is None or value is True or value is False:
        return value
    if depth == 0:
        raise NotData(f"containers nested more than {DEPTH} deep")
    for kind, encoded in _KINDS:
        if isinstance(value, kind):
            return encoded(value, depth - 1)
    raise NotData(f"an object of type {type(value).__name__}, which is no plain data")


def _integer(value: int, depth: int) -> Any:
    plain = int.__index__(value)
    return plain if -LARGE < plain < LARGE else {"int": hex(plain)}


def _real(value: float, depth: int) -> Any:
    plain = float.__float__(value)
    return plain if math.isfinite(plain) else {"float": float.__repr__(plain)}


def _list(value: list[Any], depth: int) -> Any:
    return [encode(item, depth) for item in list.__iter__(value)]


def _dict(value: dict[Any, Any], depth: int) -> Any:
    return {"dict": [[encode(key, depth), encode(item, depth)] for key, item in dict.items(value)]}


_KINDS: tuple[tuple[Any, Any], ...] = (
    (int, _integer),
    (float, _real),
    (str, lambda value, depth: str.__str__(value)),
    (list, _list),
    (tuple, lambda value, depth: {"tuple": [encode(item, depth) for item in tuple.__iter__(value)]}),
    (dict, _dict),
    (set, lambda value, depth: {"set": [encode(item, depth) for item in set.__iter__(value)]}),
    (frozenset, lambda value, depth: {"set": [encode(item, depth) for item in frozenset.__iter__(value)]}),
    (bytes, lambda value, depth: {"bytes": bytes.hex(value)}),
    (bytearray, lambda value, depth: {"bytes": bytearray.hex(value)}),
    (complex, lambda value, depth: {"complex": [_real(value.real, depth), _real(value.imag, depth)]}),
)


def same(expected: Any, found: Any, tolerance: float = 0.0) -> bool:
    """Equal as Python's plain data are, but that true is not 1; numbers may differ by `tolerance`. NaN equals NaN.

    `expected` comes from `encode`; `found` is JSON from anyone, of any depth.
    """
    try:
        return _same(expected, found, tolerance)
    except RecursionError:
        return False


def _same(expected: Any, found: Any, tolerance: float) -> bool:
    number = _number(expected)
    if number is not None:
        other = _number(found)
        return other is not None and _close(number, other, tolerance)
    if expected is None or isinstance(expected, bool):
        return found is expected
    if type(found) is not type(expected):
        return False
    if isinstance(expected, str):
        return bool(found == expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            _same(mine, theirs, tolerance) for mine, theirs in zip(expected, found, strict=True)
        )
    if list(found) != list(expected):
        return False
    (tag, content), (other,) = next(iter(expected.items())), found.values()
    if tag in ("set", "dict"):
        return isinstance(other, list) and len(other) == len(content) and _UNORDERED[tag](content, other, tolerance)
    return _same(content, other, tolerance)


def _same_members(expected: list[Any], found: list[Any], tolerance: float) -> bool:
    return sorted(map(_key, found)) == sorted(map(_key, expected))


def _same_items(expected: list[Any], found: list[Any], tolerance: float) -> bool:
    waiting = {_key(key): value for key, value in expected}
    for item in found:
        if not (isinstance(item, list) and len(item) == 2) or (key := _key(item[0])) not in waiting:
            return False
        if not _same(waiting.pop(key), item[1], tolerance):
            return False
    return not waiting


_UNORDERED = {"set": _same_members, "dict": _same_items}


def _key(value: Any) -> str:
    """A text that is equal for the same values, and for no others.

    Values of a program are never put into sets themselves: numbers can be chosen to have equal hashes.
    """
    number = _number(value)
    if number is not None:
        whole = math.isfinite(number) and number == int(number)
        return hex(int(number)) if whole else repr(number)
    if isinstance(value, list):
        return f"[{','.join(map(_key, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(tag)}:{_inner_key(tag, content)}' for tag, content in value.items())}}}"
    return json.dumps(value)


def _inner_key(tag: str, content: Any) -> str:
    if tag in _UNORDERED and isinstance(content, list):
        return f"[{','.join(sorted(map(_key, content)))}]"
    return _key(content)


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, dict) and len(value) == 1:
        try:
            if isinstance(value.get("int"), str):
                return int(value["int"], 16)
            if value.get("float") in ("inf", "-inf", "nan"):
                return float(value["float"])
        except ValueError:
            return None
    return None


def _close(one: float, other: float, tolerance: float) -> bool:
    if one == other or (one != one and other != other):
        return True
    try:
        return tolerance > 0 and abs(one - other) <= tolerance
    except OverflowError:  # a whole number beyond what a float can hold, and a float
        return False


def truth(found: Any) -> bool:
    """What `if` makes of a value, read from its data."""
    number = _number(found)
    if number is not None:
        return number != 0
    if isinstance(found, dict):
        return found.get("complex") != [0.0, 0.0] and all(found.values())
    return bool(found)
