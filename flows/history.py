"""Earlier records of a recipe's stages: what changed since a stage's last one, followed back to its cause.

A stage is compared with what it was itself: records of its name in its recipe, never those of others like it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from artifacts import Record, Store
from artifacts.digest import is_sha256
from flows.causes import Cause, roots
from flows.changes import Change, changes, nearest_identities
from flows.inputs import StageOutput
from flows.lost import Losses
from flows.recipe import Recipe, RecipeStage
from flows.written import source_of

RECENT = 200
"""Of a kind of stage, so many that had a record last are looked at: a store may hold any number."""
PARTS = ("version", "config", "inputs")
"""Of an identity."""
MOST_COMPARED = 8
"""Of records with equally few differences, how many are followed back, to find the one with the fewest causes."""
MOST_NAMED = 3
"""Of what changed, in a plan and in the log; `posttrain why` has all."""


@dataclass(frozen=True)
class Step:
    """A stage as its history needs it. `sources`: input -> the stage behind each of its entries; None: none of ours."""

    name: str
    uses: str
    sources: Mapping[str, tuple[str | None, ...]]
    config: Mapping[str, Any] = field(default_factory=dict)
    """With the names of files, as written."""
    source: str = ""
    """Where its rows come from, as the recipe names it."""

    @classmethod
    def of(cls, recipe: Recipe, stage: RecipeStage) -> Step:
        sources = {
            name: tuple(entry.stage if isinstance(entry, StageOutput) else None for entry in entries)
            for name, entries in stage.inputs.items()
        }
        config = stage.config.model_dump(mode="json")
        return cls(stage.name, stage.uses.name, sources, config, source_of(recipe, stage.name))

    def words(self, change: Change, before: Record) -> str:
        """Of a change since a record, which holds what the recipe called the source by then."""
        was = str(before.provenance.get("source") or "")
        if (
            change.what in ("data", "code")
            and change.name.startswith("source.")
            and was
            and self.source not in ("", was)
        ):
            return f"with.{change.name}: {was} -> {self.source}"
        return change.words(self.config)


@dataclass(frozen=True)
class Comparison:
    """What differs from the nearest earlier record; `record` None: there is nothing to compare with."""

    record: Record | None
    causes: tuple[Cause, ...]


class History:
    """Reads the records of each kind of stage once."""

    FIRST: ClassVar[str] = "first run"

    def __init__(self, recipe: str, steps: Mapping[str, Step], store: Store) -> None:
        self.recipe = recipe
        self.steps = steps
        self.store = store
        self._records: dict[str, list[Record]] = {}
        self._writers: dict[str, dict[str, Record]] = {}
        self._losses = Losses(store)
        self._found: dict[tuple[str, str, str], tuple[Cause, ...]] = {}

    @classmethod
    def of(cls, recipe: Recipe, store: Store) -> History:
        """Of the stages of a recipe."""
        return cls(recipe.name, {name: Step.of(recipe, stage) for name, stage in recipe.stages.items()}, store)

    def why(self, name: str, identity: Mapping[str, Any], fingerprint: str) -> tuple[str, ...]:
        """Why no record of this fingerprint counts."""
        lost = self.lost(name, fingerprint)
        return (lost,) if lost else self._lines(self.compare(name, identity))

    def lost(self, name: str, fingerprint: str) -> str | None:
        """What became of the outputs of a record that does not count; None: there is no record."""
        return self._losses.fate(self.store.records(self.steps[name].uses, fingerprint))

    def own_changes(self, name: str, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Why the stage will run whatever its unknown inputs turn out to be; empty: that depends on them.

        `known` is the identity with the inputs that are known.
        """
        step = self.steps[name]
        unknown, plain = _unknown(step, known), json.loads(json.dumps(known))
        if any(_without(record.identity, unknown) == plain for record in self.records(step.uses)):
            return ()  # it was done with some inputs, whoever did it: perhaps with those that are to come
        return self._lines(self.compare(name, known))

    def compare(self, name: str, identity: Mapping[str, Any], before: Record | None = None) -> Comparison:
        """An identity, perhaps without inputs that are not known yet, against the nearest record, or the nearest of
        those older than `before`."""
        step = self.steps[name]
        unknown = _unknown(step, identity)
        candidates = self._candidates(step, before)
        found = nearest_identities(identity, [_without(record.identity, unknown) for record in candidates])
        compared = [
            (candidates[index], tuple(self._cause(step, change, candidates[index]) for change in differences))
            for index, differences in found[:MOST_COMPARED]
        ]
        if not compared:
            return Comparison(None, ())
        return Comparison(*min(compared, key=lambda pair: len(roots(pair[1]))))

    def _lines(self, found: Comparison) -> tuple[str, ...]:
        if found.record is None:
            return (self.FIRST,)
        lines = tuple(dict.fromkeys(cause.line() for cause in found.causes))
        more = len(lines) - MOST_NAMED
        return lines if more <= 0 else (*lines[:MOST_NAMED], f"and {more} more")

    def _candidates(self, step: Step, before: Record | None) -> list[Record]:
        """Records to compare with, newest first: of this stage of this recipe, or of the one that wrote `before`."""
        records = self.records(step.uses)
        place = (self.recipe, step.name)
        if before is not None:
            if before not in records:  # an old one
                records = self._records[step.uses] = _comparable(self.store.stage_records(step.uses))
            records = records[records.index(before) + 1 :] if before in records else records
            place = _place(before)
        return [record for record in records if _place(record) == place]

    def records(self, uses: str) -> list[Record]:
        """Of a kind of stage, newest first: the newest of all, and what the steps' names lead to."""
        if uses not in self._records:
            recent = _comparable(self.store.stage_records(uses, newest=RECENT))
            seen = {_place(record) for record in recent}
            missing = [
                step for step in self.steps.values() if step.uses == uses and (self.recipe, step.name) not in seen
            ]
            self._records[uses] = recent + [record for step in missing for record in self._named(step)]
        return self._records[uses]

    def _named(self, step: Step) -> list[Record]:
        """Records behind the artifact that a stage of this recipe gave last."""
        artifact = self.store.alias(f"{self.recipe}/{step.name}")
        return [] if artifact is None else _comparable(self.store.records_behind(artifact))

    def _writer(self, uses: str, digest: str) -> Record | None:
        """The newest record known with an output of that digest, or the one that its manifest leads to."""
        if uses not in self._writers:
            known = [(found.digest, record) for record in self.records(uses) for found in record.outputs.values()]
            self._writers[uses] = dict(reversed(known))
        writers = self._writers[uses]
        if digest not in writers and is_sha256(digest):
            behind = [
                found
                for artifact in self.store.artifacts(digest)
                for found in _comparable(self.store.records_behind(artifact))
            ]
            if behind:
                writers[digest] = behind[0]
        return writers.get(digest)

    def _cause(self, step: Step, change: Change, before: Record) -> Cause:
        because = self._behind(step, change) if change.kind == "input" else ()
        return Cause(step.name, step.words(change, before), change, because)

    def _behind(self, step: Step, change: Change) -> tuple[Cause, ...]:
        """What made the stages that wrote an input write something else, as far as it can be found out."""
        sources = step.sources.get(change.name, ())
        old = change.old if isinstance(change.old, list) else [change.old]
        new = change.new if isinstance(change.new, list) else [change.new]
        if len(old) != len(new) or len(new) != len(sources):
            return ()
        found = [
            self._between(self.steps[source], str(before), str(after))
            for source, before, after in zip(sources, old, new, strict=True)
            if before != after and source is not None
        ]
        return found[0] if len(found) == 1 else tuple(cause for causes in found for cause in causes)

    def _between(self, producer: Step, before: str, after: str) -> tuple[Cause, ...]:
        key = (producer.name, before, after)
        if key not in self._found:
            self._found[key] = tuple(self._differences(producer, before, after))
        return self._found[key]

    def _differences(self, producer: Step, before: str, after: str) -> Iterator[Cause]:
        old, new = self._writer(producer.uses, before), self._writer(producer.uses, after)
        if old is None or new is None:
            return
        differences = changes(old.identity, new.identity)
        if not differences:
            yield Cause(producer.name, "wrote other bytes from equal inputs")
        for change in differences:
            yield self._cause(producer, change, old)


def _place(record: Record) -> tuple[str, str]:
    """The recipe and the name of the stage that a record is of."""
    return str(record.provenance.get("recipe")), str(record.provenance.get("stage_name"))


def _unknown(step: Step, identity: Mapping[str, Any]) -> frozenset[str]:
    """Inputs of the stage that an identity does not have yet."""
    return frozenset(step.sources) - frozenset(identity["inputs"])


def _comparable(records: list[Record]) -> list[Record]:
    """Those that say what they are of: a store may have been written by somebody else."""
    return [record for record in records if all(record.identity.get(part) is not None for part in PARTS)]


def _without(identity: Mapping[str, Any], inputs: frozenset[str]) -> dict[str, Any]:
    kept = {name: digest for name, digest in identity["inputs"].items() if name not in inputs}
    return {**identity, "inputs": kept}
