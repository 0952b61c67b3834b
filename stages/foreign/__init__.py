"""What TRL, Axolotl, LLaMA-Factory and others call things, and what does the same here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from stages.foreign import (
    adapters,
    batches,
    data,
    engines,
    losses,
    memory,
    models,
    optimizer,
    rewards,
    rollouts,
    running,
    teachers,
    trackers,
)
from stages.foreign.concept import Concept
from stages.foreign.values import VALUES, foreign_value

__all__ = ["CONCEPTS", "FOREIGN", "VALUES", "Concept", "foreign", "foreign_value", "is_answered_here"]

CONCEPTS: tuple[Concept, ...] = (
    *batches.CONCEPTS,
    *optimizer.CONCEPTS,
    *memory.CONCEPTS,
    *adapters.CONCEPTS,
    *losses.CONCEPTS,
    *teachers.CONCEPTS,
    *rewards.CONCEPTS,
    *rollouts.CONCEPTS,
    *engines.CONCEPTS,
    *data.CONCEPTS,
    *models.CONCEPTS,
    *running.CONCEPTS,
    *trackers.CONCEPTS,
)

FOREIGN = {name: concept for concept in CONCEPTS for name in concept.called}
"""Name elsewhere -> what it is."""


def foreign(name: str, valid: Sequence[str], elsewhere: Mapping[str, Sequence[str]] | None = None) -> str:
    """`; here it is 'x' (TRL)` where the key is another tool's name, or what is done in its place; else nothing.

    `elsewhere`: section -> names that belong there.
    """
    concept = FOREIGN.get(name)
    if concept is None:
        return ""
    whose = concept.called[name]
    if not concept.fields:
        return f"; {concept.note} ({whose})"
    note = f": {concept.note}" if concept.note else ""
    other = f", of a stage `{concept.stage}`" if concept.stage else ", which is not taken here"
    field, place = next(_places(concept, valid, elsewhere or {}), (concept.fields[0], other))
    return f"; here it is `{concept.written or field}`{place} ({whose}{note})"


def is_answered_here(name: str, valid: Sequence[str]) -> bool:
    """Whether one of these fields does what another tool's name asks for."""
    concept = FOREIGN.get(name)
    return concept is not None and any(field in valid for field in concept.fields)


def _places(
    concept: Concept, valid: Sequence[str], elsewhere: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Fields that there are, each with where it stands."""
    yield from ((field, "") for field in concept.fields if field in valid)
    for section, names in elsewhere.items():
        yield from ((field, f" under `{section}:`") for field in concept.fields if field in names)
