"""What a plan has to see outside of recipe and store: what stages wrote elsewhere, and how names were understood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from artifacts import Record, Store
from artifacts.errors import DamagedError, StageError, UnreachableError
from flows.inputs import ResolvedInput
from flows.recipe import RecipeStage


def fallen_outside(stage: RecipeStage, record: Record, store: Store) -> str | None:
    """Why a record does not count, since what the stage wrote outside of the store is not there, or nobody can tell;
    None: it counts."""
    if stage.uses.stands is None:
        return None
    try:
        folders = {name: store.materialize(output) for name, output in record.outputs.items()}
    except DamagedError as error:
        return str(error)
    try:
        return stage.uses.stands(stage.config, folders)
    except (StageError, UnreachableError) as error:
        run = record.provenance.get("run", "unknown")
        return (
            f"whether what run {run} did still stands cannot be seen: {error}. It is done again at its turn, which "
            "changes nothing where it stands; leave it out by --only or --until"
        )


def notes_on(inputs: Mapping[str, tuple[ResolvedInput, ...]], heard: Iterable[str]) -> tuple[str, ...]:
    """What people are to know of how inputs, and names of the Hub in the configuration, were understood; each once."""
    found = [note for entries in inputs.values() for entry in entries for note in entry.notes]
    return tuple(dict.fromkeys([*found, *heard]))
