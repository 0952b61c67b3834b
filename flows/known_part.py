"""What can be said of a configuration of which some fields are wrong, so that all mistakes are named at once.

The fields that are right make an object whose other fields are not there. A check that reads one of those ends, and
what it would have said is left for the next time; nothing is said that the wrong fields might change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from flows.validate import infinite, meant
from stages.stage import Config

Said = TypeVar("Said")


def known_part(model: type[Config], values: Mapping[str, Any]) -> Config:
    """The fields written that are right and the defaults of those not written. To read a field that is wrong, or that
    an unknown key may have meant, raises AttributeError."""
    fields = model.model_fields
    wrong = _wrong(model, values)
    right = {name: _read(fields[name], value) for name, value in values.items() if name in fields and name not in wrong}
    known = model.model_construct(_fields_set=set(right), **right)
    for name in (wrong | meant(values, fields)) - set(right):
        known.__dict__.pop(name, None)
    return known


def _wrong(model: type[Config], values: Mapping[str, Any]) -> set[str]:
    """Fields whose values are wrong or missing."""
    wrong = {str(place[0]) for place, _ in infinite(values)}
    try:
        model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        wrong |= {str(entry["loc"][0]) for entry in error.errors() if entry["loc"]}
    return wrong


def _read(field: FieldInfo, value: Any) -> Any:
    return TypeAdapter(field.rebuild_annotation()).validate_json(json.dumps(value), strict=True)


def wrong_together(known: Config) -> Iterator[str]:
    """What the validators of the whole model find in the part that is known."""
    for validator in type(known).__pydantic_decorators__.model_validators.values():
        if validator.info.mode == "after":
            yield from as_far_as_known(_raised, validator.func, known)


def as_far_as_known(check: Callable[..., Iterable[Said]], *arguments: Any) -> list[Said]:
    """What the check says, or nothing where it needs a field that is not known."""
    try:
        return list(check(*arguments))
    except AttributeError:
        return []


def _raised(validator: Callable[[BaseModel], Any], known: BaseModel) -> Iterator[str]:
    try:
        validator(known)
    except ValueError as error:
        yield str(error)
