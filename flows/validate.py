"""Strict validation of a part of a recipe against a pydantic model, with every mistake in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from artifacts.errors import Problem
from flows.document import Document, Place
from flows.fields import Slot, entry_slots, expectation, field_slots, found, is_model, models_at, slots_at
from stages.foreign import FOREIGN, foreign, foreign_value, is_answered_here
from stages.names import closest, nearest, one_slip
from stages.stage import STAGES, Config, load_stage

Model = TypeVar("Model", bound=BaseModel)

_MOST_NAMED = 3
"""Stages in a message."""


def validate(
    model: type[Model],
    values: Mapping[str, Any],
    document: Document,
    place: Place,
    elsewhere: Mapping[str, Sequence[str]],
) -> tuple[Model | None, list[Problem]]:
    """The model of `values`, which stand at `place` of the document, or what is wrong with them.

    `elsewhere`: section -> names that belong there, for a key written in the wrong section.
    Strict: "3" is no number and true is no 1; a whole number is a number, a list a tuple.
    """
    wrong = {inner: f"{number} is not a finite number" for inner, number in infinite(values)}
    made = None
    try:
        made = model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        listed: set[tuple[str, ...]] = set()
        for inner, kinds in _by_place(error, values).items():
            if inner not in wrong:
                wrong[inner] = _message(model, values, inner, kinds, elsewhere, listed)
        wrong = {inner: what for inner, what in wrong.items() if not _misspelt(inner, error, model, values)}
    problems = [document.problem((*place, *inner), what) for inner, what in wrong.items()]
    return None if wrong else made, problems


def meant(keys: Iterable[str], valid: Collection[str]) -> set[str]:
    """The valid names that unknown keys may stand for."""
    unknown = [key for key in keys if key not in valid]
    concepts = [FOREIGN[key] for key in unknown if key in FOREIGN]
    close = {closest(key, valid) for key in unknown} - {None}
    return {str(name) for name in close} | {field for concept in concepts for field in concept.fields}


def _misspelt(place: Place, error: ValidationError, model: type[BaseModel], values: Any) -> bool:
    """Whether the value at a place is missing since a key beside it, which is refused, is misspelt."""
    kinds = {_written_place(entry["loc"], values, entry["type"]): entry["type"] for entry in error.errors()}
    if kinds.get(place) != "missing" or not isinstance(place[-1], str):
        return False
    valid = [name for owner in models_at(model, place[:-1]) for name in owner.model_fields]
    written = _value_at(values, place[:-1])
    return isinstance(written, Mapping) and place[-1] in meant(written, valid)


def unknown_key(
    key: str, valid: Sequence[str], elsewhere: Mapping[str, Sequence[str]], listed: set[tuple[str, ...]]
) -> str:
    """`unknown key; did you mean 'beta'?`, or where the key belongs, or what we call it.

    `listed`: the names known that a message before this one lists already; this one's are added.
    """
    same = next((section for section, names in elsewhere.items() if key in names), None)
    answered = is_answered_here(key, valid)  # dtype of others is bf16 here, though rollouts have a dtype of their own
    if same is not None and not answered:
        return f"unknown key here; {key!r} belongs under `{same}:`"
    # of several that look alike, the one that a single slip of the finger makes
    slips = [name for name in valid if one_slip(key, name)]
    near = nearest(key, slips or valid)
    hint = near if slips and not answered else foreign(key, valid, elsewhere) or _setting_of_others(key) or near
    if hint:
        apart = "" if same is None else f"; one of that name is under `{same}:`"
        return f"unknown key{hint}{apart}"
    for section, names in elsewhere.items():
        if near := nearest(key, names):
            return f"unknown key{near} (it belongs under `{section}:`)"
    if tuple(valid) in listed:
        return "unknown key; the known ones are listed above"
    listed.add(tuple(valid))
    return f"unknown key; known are: {', '.join(valid)}"


def _setting_of_others(key: str) -> str:
    """`; it is a setting of rl, ppo and 3 more` where other stages have it."""
    having = [name for name in STAGES if key in load_stage(name).config.model_fields]
    if not having:
        return ""
    more = f" and {len(having) - _MOST_NAMED} more" if len(having) > _MOST_NAMED else ""
    return f"; it is a setting of {', '.join(having[:_MOST_NAMED])}{more}"


def infinite(values: Any, place: Place = ()) -> Iterator[tuple[Place, float]]:
    """Numbers that JSON does not have, with their places."""
    if isinstance(values, float) and not math.isfinite(values):
        yield place, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from infinite(value, (*place, key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from infinite(value, (*place, index))


def _by_place(error: ValidationError, values: Any) -> dict[Place, list[Any]]:
    """The errors by their place in the written values; of a union, those of the branch that came furthest."""
    grouped: dict[Place, list[Any]] = {}
    for entry in error.errors(include_url=False):
        grouped.setdefault(_written_place(entry["loc"], values, entry["type"]), []).append(entry)
    return {
        place: entries
        for place, entries in grouped.items()
        if not (_of_branches(place, entries) and any(_encloses(place, other) for other in grouped))
    }


def _of_branches(place: Place, entries: Sequence[Any]) -> bool:
    """Whether the locations name branches of a union, which are written nowhere."""
    return any(len(entry["loc"]) > len(place) for entry in entries)


def _encloses(place: Place, other: Place) -> bool:
    return len(other) > len(place) and other[: len(place)] == place


def _written_place(location: Sequence[str | int], values: Any, kind: str) -> Place:
    """The location without the names that pydantic gives to the branches of a union."""
    place: list[str | int] = []
    for index, part in enumerate(location):
        if _has(values, part):
            values = values[part]
        elif not (kind == "missing" and index == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, list):
        return isinstance(part, int) and part < len(values)
    return isinstance(values, Mapping) and part in values


def _message(
    model: type[BaseModel],
    values: Any,
    place: Place,
    entries: Sequence[Any],
    elsewhere: Mapping[str, Sequence[str]],
    listed: set[tuple[str, ...]],
) -> str:
    kinds = {entry["type"] for entry in entries}
    if kinds == {"extra_forbidden"}:
        return _unknown_field(model, place, elsewhere, listed)
    if "missing" in kinds:
        return f"missing; expected {expectation(slots_at(model, place))}"
    custom = [entry for entry in entries if entry["type"] in ("value_error", "assertion_error")]
    if custom:
        return "; ".join(str(entry["ctx"]["error"]) for entry in custom)
    return wrong_value(model, place, _value_at(values, place))


def _unknown_field(
    model: type[BaseModel],
    place: Place,
    elsewhere: Mapping[str, Sequence[str]],
    listed: set[tuple[str, ...]],
) -> str:
    *above, key = place
    owners = models_at(model, above)
    for owner in owners:
        if issubclass(owner, Config) and key in owner.absent:
            return f"{key} is not taken here: {owner.absent[str(key)]}"
    valid = [name for owner in owners for name in owner.model_fields]
    nested = {
        dotted_name: list(inner.model_fields)
        for owner in owners
        for dotted_name, info in owner.model_fields.items()
        for inner in (slot.annotation for slot in field_slots(info))
        if is_model(inner)
    }
    return unknown_key(str(key), valid, nested if above else {**elsewhere, **nested}, listed)


def wrong_value(model: type[BaseModel], place: Place, value: Any) -> str:
    """`expected a number above 0, found text '0.1' (remove the quotes)`"""
    alternatives = slots_at(model, place)
    field = next((part for part in reversed(place) if isinstance(part, str)), "")
    return f"expected {expectation(alternatives)}, found {found(value)}{_way(field, alternatives, value)}"


def _way(field: str, alternatives: Sequence[Slot], value: Any) -> str:
    """What to write instead, as far as it can be guessed."""
    choices = _choices(alternatives)
    entries = _choices([entry for slot in alternatives for entry in entry_slots(slot)])
    if said := foreign_value(field, value, [*choices, *entries]):
        return said
    if value is False and "none" in choices:
        return " (write none)"
    if isinstance(value, str):
        if any(slot.annotation in (int, float) for slot in alternatives) and _is_number(value):
            return " (remove the quotes)"
        if any(slot.annotation is bool for slot in alternatives) and value.lower() in ("yes", "no", "on", "off"):
            return " (write true or false)"
        if value in entries:
            return f" (write [{value}])"
        if entries and value.lower() == "none":
            return " (write [])"
        return nearest(value, [*choices, *entries])
    if any(slot.annotation is str for slot in alternatives) and isinstance(value, int | float):
        return " (put it in quotes)"
    return ""


def _choices(alternatives: Iterable[Slot]) -> list[str]:
    """The texts to choose from."""
    return [
        choice
        for slot in alternatives
        for choice in getattr(slot.annotation, "__args__", ())
        if isinstance(choice, str)
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value_at(values: Any, place: Place) -> Any:
    for part in place:
        values = values[part]
    return values
