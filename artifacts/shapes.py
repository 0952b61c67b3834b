"""What JSON from a store must look like before anything works with it: whoever wrote it may have meant harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shown(name: str) -> str:
    """A name from a store as it may be printed: as it is, or quoted where it holds what steers a terminal."""
    return name if name.isprintable() else ascii(name)


def mapping(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object under a name. Raises TypeError."""
    found = value[name]
    if not isinstance(found, dict):
        raise TypeError(f"{name} is {_kind(found)}, not an object")
    return found


def origin(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object under a name that says how something was made: stage, version, config, inputs, or none of these.
    Raises TypeError."""
    found = mapping(value, name)
    for part, kinds in (("stage", str), ("config", dict), ("inputs", dict)):
        if not isinstance(found.get(part), kinds | None):  # type: ignore[operator]
            raise TypeError(f"{name}.{part} is {_kind(found[part])}")
    for given, named in (found.get("inputs") or {}).items():
        if not all(isinstance(one, str | dict) for one in (named if isinstance(named, list) else [named])):
            raise TypeError(f"{name}.inputs.{shown(given)} is {_kind(named)}, not an id or a list of ids")
    return found


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
