"""Earlier records of a recipe's stages: what changed since the nearest one, followed back to its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from artifacts import Record, Store
from flows.changes import Change, changes, nearest_identity
from flows.inputs import StageOutput
from flows.recipe import Recipe, RecipeStage


class History:
    """Reads the records of each kind of stage once."""

    FIRST: ClassVar[str] = "first run: nothing like it in the store"

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe = recipe
        self.store = store
        self._records: dict[str, list[Record]] = {}

    def why(self, stage: RecipeStage, identity: Mapping[str, Any], fingerprint: str) -> tuple[str, ...]:
        """Why no record of this fingerprint counts."""
        damaged = self.store.records(stage.uses.name, fingerprint)
        if damaged:
            ids = ", ".join(found.id[:15] for found in damaged[0].outputs.values())
            return (f"output damaged or gone: {ids}",)
        return self._since_nearest(stage, identity, frozenset())

    def own_changes(self, stage: RecipeStage, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Why the stage will run whatever its unknown inputs turn out to be; empty: that depends on them.

        `known` is the identity with the inputs that are known.
        """
        unknown = frozenset(stage.inputs) - frozenset(known["inputs"])
        return self._since_nearest(stage, known, unknown)

    def _since_nearest(
        self, stage: RecipeStage, identity: Mapping[str, Any], unknown: frozenset[str]
    ) -> tuple[str, ...]:
        candidates, same_place = self._candidates(stage)
        found = nearest_identity(identity, [_without(record.identity, unknown) for record in candidates])
        if found is None:
            return (self.FIRST,)
        index, differences = found
        if not differences:
            return ()
        record = candidates[index]
        words = tuple(self._words(stage, change) for change in differences)
        if same_place:
            return words
        other = record.provenance.get("stage_name", record.stage)
        return (f"first run of {stage.name}; against the nearest, {other}: {'; '.join(words)}",)

    def _candidates(self, stage: RecipeStage) -> tuple[list[Record], bool]:
        """Records to compare with, newest first: of this stage of the recipe, of its name, or of its kind."""
        records = self._of(stage.uses.name)
        named = [record for record in records if record.provenance.get("stage_name") == stage.name]
        here = [record for record in named if record.provenance.get("recipe") == self.recipe.name]
        return here or named or records, bool(here or named)

    def _of(self, uses: str) -> list[Record]:
        if uses not in self._records:
            self._records[uses] = list(self.store.stage_records(uses))
        return self._records[uses]

    def _words(self, stage: RecipeStage, change: Change) -> str:
        if change.kind != "input":
            return change.words(stage.config)
        cause = self._cause(stage, change)
        return f"input {change.name} changed (because {cause})" if cause else change.words()

    def _cause(self, stage: RecipeStage, change: Change) -> str | None:
        """What made the stage that wrote the input write something else; None: it was not found out."""
        references = stage.inputs.get(change.name, ())
        old = change.old if isinstance(change.old, list) else [change.old]
        new = change.new if isinstance(change.new, list) else [change.new]
        if len(old) != len(new) or len(new) != len(references):
            return None
        for reference, before, after in zip(references, old, new, strict=True):
            if before != after and isinstance(reference, StageOutput):
                return self._cause_in(self.recipe.stages[reference.stage], str(before), str(after))
        return None

    def _cause_in(self, producer: RecipeStage, before: str, after: str) -> str | None:
        records = self._of(producer.uses.name)
        old, new = _writer(records, before), _writer(records, after)
        if old is None or new is None:
            return None
        differences = changes(old.identity, new.identity)
        if not differences:
            return f"{producer.name} wrote other bytes from equal inputs"
        own = [change.words(producer.config) for change in differences if change.kind != "input"]
        if own:
            return f"{producer.name}: {'; '.join(own)}"
        return self._cause(producer, differences[0]) or f"{producer.name}: {differences[0].words()}"


def _writer(records: Sequence[Record], digest: str) -> Record | None:
    """The newest record with an output of that digest."""
    for record in records:
        if any(found.digest == digest for found in record.outputs.values()):
            return record
    return None


def _without(identity: Mapping[str, Any], inputs: frozenset[str]) -> dict[str, Any]:
    kept = {name: digest for name, digest in identity["inputs"].items() if name not in inputs}
    return {**identity, "inputs": kept}
