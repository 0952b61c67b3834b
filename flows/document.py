"""Values of which each knows where it stands: a recipe as it was written, and mistakes in the order of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts.errors import Problem

Place = tuple[str | int, ...]
"""The keys and indices that lead to a value: `("stages", "dpo", "with", "beta")`."""


@dataclass(frozen=True)
class Document:
    """Plain values with the origin of each: `recipe.yaml:12`, or the `--set` that gave it."""

    data: Any
    origin: str
    origins: Mapping[Place, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    """Mistakes of form, of what can be read all the same."""

    def where(self, place: Place) -> str:
        """`recipe.yaml:12: stages.dpo.with.beta`; a value not written has the origin of what encloses it."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.origins:
                found = self.origins[place[:length]]
                break
        else:
            found = self.origin
        return f"{found}: {dotted(place)}" if place else found

    def problem(self, place: Place, what: str) -> Problem:
        """A mistake at one place of this document."""
        return Problem(self.where(place), what, place)


def dotted(place: Iterable[str | int]) -> str:
    """`stages.dpo.with.weights[0]`"""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def in_order(problems: Iterable[Problem], data: Any) -> list[Problem]:
    """Each mistake once: first those that stand nowhere in these values, the others in the order of the values."""
    return sorted(dict.fromkeys(problems), key=lambda problem: tuple(_way(problem.place, data)))


def _way(place: Place, data: Any) -> Iterator[int]:
    """The position of every key and index that leads to a place; what is missing stands before what is there."""
    for part in place:
        if isinstance(data, Mapping) and part in data:
            yield list(data).index(str(part))
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            yield part
            data = data[part]
        else:
            yield -1
            return
