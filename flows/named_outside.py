"""What a configuration names that lies outside of the recipe: data, code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from artifacts.errors import RequestError
from flows.document import Place
from flows.fields import slots_at
from stages.stage import Config, External


def refused_outside(
    model: type[Config], values: Mapping[str, Any], check: Callable[[External, str], Any]
) -> Iterator[tuple[Place, str]]:
    """Where the values of a configuration name something outside that the check raises RequestError of, and why."""
    for place, text in _texts(values, ()):
        marks = [mark for slot in slots_at(model, place) for mark in slot.metadata if isinstance(mark, External)]
        if not marks:
            continue
        try:
            check(marks[0], text)
        except RequestError as error:
            yield place, str(error)


def _texts(values: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, (*place, key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _texts(value, (*place, index))
