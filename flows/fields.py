"""What the fields of a Config accept, in words: for messages on wrong values and for `posttrain stages`."""

from __future__ import annotations

import json
import types
from collections import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stages.identity import is_operational
from stages.stage import External

_NONE = type(None)
_REQUIRED = object()
"""In the place of a default where there is none."""
_PLURALS = (
    ("a whole number", "whole numbers"),
    ("a number", "numbers"),
    ("a mapping", "mappings"),
    ("a function", "functions"),
    ("a file, folder or URL", "files, folders or URLs"),
    ("one of", "any of"),
)
_MAPPINGS = (dict, abc.Mapping)
_LISTS = (list, tuple, set, frozenset, abc.Sequence)


@dataclass(frozen=True)
class Slot:
    """One thing a value may be at a place of a Config: its type and the constraints and marks upon it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()


def slots(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[Slot]:
    """The alternatives of a type, unions and `Annotated` taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        yield from slots(inner, (*metadata, *_flat(extra)))
    elif origin is Union or origin is types.UnionType:
        for alternative in get_args(annotation):
            yield from slots(alternative, metadata)
    else:
        yield Slot(annotation, tuple(metadata))


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from entry.metadata
        else:
            yield entry


def field_slots(info: FieldInfo) -> list[Slot]:
    """What one field of a Config takes."""
    return list(slots(info.annotation, info.metadata))


def slots_at(model: type[BaseModel], place: Sequence[str | int]) -> list[Slot]:
    """What the value at `place` (keys and indices from the root) may be; empty: there is no such place."""
    found = [Slot(model)]
    for part in place:
        found = [below for slot in found for below in _below(slot, part)]
    return found


def models_at(model: type[BaseModel], place: Sequence[str | int]) -> list[type[BaseModel]]:
    """The nested models that a mapping at `place` may be."""
    return [slot.annotation for slot in slots_at(model, place) if is_model(slot.annotation)]


def is_model(annotation: Any) -> bool:
    """Whether a type is a pydantic model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _below(slot: Slot, part: str | int) -> Iterator[Slot]:
    annotation = slot.annotation
    if is_model(annotation):
        if part in annotation.model_fields:
            yield from field_slots(annotation.model_fields[part])
        return
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if isinstance(part, str) and origin in _MAPPINGS:
        yield from slots(arguments[-1])
    elif isinstance(part, int) and arguments:
        several = origin is not tuple or arguments[-1] is Ellipsis
        if several or part < len(arguments):
            yield from slots(arguments[0] if several else arguments[part])


def entry_slots(slot: Slot) -> list[Slot]:
    """What an entry of a list of any length may be; of anything else nothing."""
    origin, arguments = get_origin(slot.annotation), get_args(slot.annotation)
    several = origin in _LISTS and (origin is not tuple or arguments[-1] is Ellipsis)
    return list(slots(arguments[0])) if several else []


def expectation(alternatives: Sequence[Slot]) -> str:
    """`a number above 0`, `one of sigmoid, hinge`, `text or a list of text`."""
    words = [_words(slot) for slot in alternatives if slot.annotation is not _NONE]
    if any(slot.annotation is _NONE for slot in alternatives):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def _words(slot: Slot) -> str:
    annotation, origin, arguments = slot.annotation, get_origin(slot.annotation), get_args(slot.annotation)
    if annotation is int:
        return "a whole number" + _range(slot.metadata)
    if annotation is float:
        return "a number" + _range(slot.metadata)
    if annotation is str:
        mark = next((entry for entry in slot.metadata if isinstance(entry, External)), None)
        if mark is not None:
            return {"code": "a function (file.py:name)", "data": "a file, folder or URL"}[mark.kind]
        return "text" + _length(slot.metadata, ("character", "characters"))
    if annotation is bool:
        return "true or false"
    if origin is Literal:
        values = [value if isinstance(value, str) else json.dumps(value) for value in arguments]
        return f"one of {', '.join(values)}" if len(values) > 1 else str(values[0])
    if is_model(annotation):
        return f"a mapping with the fields {', '.join(annotation.model_fields)}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        parts = [expectation(list(slots(argument))) for argument in arguments]
        return f"a list of {len(parts)}: {', '.join(parts)}"
    if origin in _LISTS:
        return f"a list of {_plural(expectation(list(slots(arguments[0]))))}" + _length(
            slot.metadata, ("entry", "entries")
        )
    if annotation is dict or origin in _MAPPINGS:
        return f"a mapping of text to {expectation(list(slots(arguments[-1])))}" if arguments else "a mapping"
    return "any value" if annotation is Any else str(getattr(annotation, "__name__", annotation))


def _plural(words: str) -> str:
    for singular, plural in _PLURALS:
        if words.startswith(singular):
            return plural + words[len(singular) :]
    return words


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    names = ("gt", "ge", "lt", "le", "min_length", "max_length", "multiple_of", "pattern")
    return {name: value for entry in metadata for name in names if (value := getattr(entry, name, None)) is not None}


def _range(metadata: Sequence[Any]) -> str:
    bounds = _bounds(metadata)
    if {"ge", "le"} <= bounds.keys():
        text = f" from {bounds['ge']:g} to {bounds['le']:g}"
    else:
        words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
        text = " and".join(f" {words[name]} {bounds[name]:g}" for name in words if name in bounds)
    return text + (f", a multiple of {bounds['multiple_of']}" if "multiple_of" in bounds else "")


def _length(metadata: Sequence[Any], unit: tuple[str, str]) -> str:
    bounds = _bounds(metadata)
    text = f" of the form {bounds['pattern']}" if "pattern" in bounds else ""
    for name, words in (("min_length", "at least"), ("max_length", "at most")):
        if name in bounds:
            text += f", {words} {bounds[name]} {unit[bounds[name] != 1]}"
    return text


def found(value: Any) -> str:
    """A value as a message names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f"text {value!r}" if len(value) <= 80 else f"text {value[:77]!r}..."
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)


@dataclass(frozen=True)
class FieldRow:
    """One field of a Config for people; a field of a nested model is `outer.inner`."""

    name: str
    accepts: str
    default: str
    """As a recipe would have it; `required` where there is none."""
    meaning: str
    operational: bool


def field_rows(model: type[BaseModel], prefix: str = "", given: BaseModel | None = None) -> Iterator[FieldRow]:
    """Every field of a Config in the order declared. `given`: the value that is there by default, where the Config is
    that of a field; its fields' values are the defaults, and the field itself says that they stand below."""
    for name, info in model.model_fields.items():
        alternatives = field_slots(info)
        plain = [slot for slot in alternatives if not is_model(slot.annotation)]
        default = _REQUIRED if given is None and info.is_required() else _default(name, info, given)
        yield FieldRow(
            prefix + name,
            expectation(alternatives if len(plain) == len(alternatives) else [*plain, Slot(dict)]),
            _shown(default),
            " ".join((info.description or "").split()),
            is_operational(info),
        )
        for slot in alternatives:
            if is_model(slot.annotation):
                own = default if isinstance(default, slot.annotation) else None
                yield from field_rows(slot.annotation, f"{prefix}{name}.", own)


def _default(name: str, info: FieldInfo, given: BaseModel | None) -> Any:
    if given is not None:
        return getattr(given, name)
    return info.get_default(call_default_factory=True, validated_data={})


def _shown(default: Any) -> str:
    if default is _REQUIRED:
        return "required"
    if isinstance(default, BaseModel):
        return "as below"
    if isinstance(default, str):
        return default
    return json.dumps(default, default=lambda other: other.model_dump(mode="json"), ensure_ascii=False)
