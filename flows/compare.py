"""`posttrain diff`: what two runs differ in, causes apart from what followed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from artifacts import Record, Store
from artifacts.errors import PosttrainError
from flows.changes import changes, leaves
from flows.reporting.reading import artifact_of
from flows.reporting.wiring import Wiring, read_wiring
from flows.why import record_of
from stages.stage import STAGES, load_stage


@dataclass(frozen=True)
class Difference:
    """One cause. `what`: field, seed, version, code, data, input, recipe, bytes, library, machine or execution.

    `stages`: where; empty for the recipe as a whole. `old` and `new` are None where there is nothing.
    """

    what: str
    stages: tuple[str, ...]
    name: str
    old: Any
    new: Any


@dataclass(frozen=True)
class StageResults:
    """What came of one stage in both runs; `states` None: that run has no such stage."""

    stage: str
    states: tuple[str | None, str | None]
    same_fingerprint: bool
    outputs: dict[str, tuple[str | None, str | None]]
    """Those that differ, by their ids."""
    files: dict[str, list[str]]
    """Output -> the files that differ."""
    metrics: dict[str, tuple[Any, Any]]
    """Those that differ, the stage's main one first."""

    @property
    def differs(self) -> bool:
        return bool(self.outputs or self.metrics or None in self.states or not self.same_fingerprint)


@dataclass(frozen=True)
class RunDifferences:
    """`causes` and what `surroundings` may have done; `stages`: what followed."""

    runs: tuple[dict[str, Any], dict[str, Any]]
    causes: tuple[Difference, ...]
    surroundings: tuple[Difference, ...]
    stages: tuple[StageResults, ...]

    def to_json(self) -> dict[str, Any]:
        """For `posttrain diff --json`."""

        def rows(found: tuple[Difference, ...]) -> list[dict[str, Any]]:
            return [{**vars(entry), "stages": list(entry.stages)} for entry in found]

        return {
            "runs": list(self.runs),
            "causes": rows(self.causes),
            "surroundings": rows(self.surroundings),
            "stages": {entry.stage: {**vars(entry), "differs": entry.differs} for entry in self.stages},
        }


def compare_runs(store: Store, old: Mapping[str, Any], new: Mapping[str, Any]) -> RunDifferences:
    """Of two runs in the store (`which_run.read_run`)."""
    both = [name for name in old["stages"] if name in new["stages"]]
    others = [name for run in (old, new) for name in run["stages"] if name not in both]
    sides = {name: (_Side.of(store, old, name), _Side.of(store, new, name)) for name in both}
    surroundings = [found for name in both for found in _around(name, *sides[name])]
    headers = tuple(
        {key: run[key] for key in ("run", "recipe", "state", "started_at", "seconds")} for run in (old, new)
    )
    return RunDifferences(
        runs=(headers[0], headers[1]),
        causes=tuple(_causes(old, new, sides)),
        surroundings=tuple(_together(surroundings)),
        stages=tuple(
            _results(store, name, old["stages"].get(name), new["stages"].get(name))
            for name in [*both, *dict.fromkeys(others)]
        ),
    )


def causes_between(store: Store, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Of two runs in the store: what they differ in by themselves."""
    both = [name for name in old["stages"] if name in new["stages"]]
    return _causes(old, new, {name: (_Side.of(store, old, name), _Side.of(store, new, name)) for name in both})


def _causes(
    old: Mapping[str, Any], new: Mapping[str, Any], sides: Mapping[str, tuple[_Side, _Side]]
) -> list[Difference]:
    wiring = read_wiring(new)
    causes = [cause for name, both in sides.items() for cause in _own_causes(name, *both, wiring)]
    explained = {f"stages.{cause.stages[0]}.with.{cause.name}" for cause in causes}
    return [*causes, *_of_recipe(old, new, explained)]


@dataclass(frozen=True)
class _Side:
    entry: Mapping[str, Any]
    record: Record | None

    @classmethod
    def of(cls, store: Store, run: Mapping[str, Any], name: str) -> _Side:
        entry = run["stages"][name]
        return cls(entry, record_of(store, run, entry))

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """Of a stage that gave nothing as its run has it; None: it was not reached, or an older version ran it."""
        return self.entry.get("identity") if self.record is None else self.record.identity


def _own_causes(name: str, old: _Side, new: _Side, wiring: Wiring) -> Iterator[Difference]:
    """What a stage differs in by itself; inputs only where no stage of the recipe is behind them."""
    if old.identity is None or new.identity is None:
        return
    inner = {wire.name for wire in wiring.wires[name] if wire.source is not None}
    found = changes(old.identity, new.identity)
    for change in found:
        if change.kind != "input" or change.name not in inner:
            values = change.to_json()
            yield Difference(change.what, (name,), change.name, values.get("old"), values.get("new"))
    if old.record is None or new.record is None or found:
        return
    if old.entry["outputs"] != new.entry["outputs"]:
        runs = (old.record.provenance.get("run"), new.record.provenance.get("run"))
        yield Difference("bytes", (name,), "other bytes from equal inputs", *runs)


def _of_recipe(old: Mapping[str, Any], new: Mapping[str, Any], explained: set[str]) -> Iterator[Difference]:
    """Lines of the recipes that differ and that no stage's identity shows: hardware, wiring, names, and of a stage that
    one of them lacks what it `uses`."""
    before, after = (dict(leaves(yaml.safe_load(run["recipe_yaml"]))) for run in (old, new))
    whole = {f"stages.{name}" for name in set(old["stages"]) ^ set(new["stages"])}
    for place in dict.fromkeys([*before, *after]):
        alone = any(place.startswith(f"{stage}.") and place != f"{stage}.uses" for stage in whole)
        if before.get(place) != after.get(place) and place not in explained and not alone:
            yield Difference("recipe", (), place, before.get(place), after.get(place))


def _around(name: str, old: _Side, new: _Side) -> Iterator[Difference]:
    """Libraries, machines, and how the stage was run; of one record on both sides, nothing."""
    if old.record is None or new.record is None:
        return
    before, after = old.record.provenance, new.record.provenance
    for what, keys in (
        ("library", ("versions",)),
        ("machine", ("machine",)),
        ("execution", ("processes", "threads", "launcher", "operational", "resumed_from")),
    ):
        was, now = (dict(leaves({key: side.get(key) for key in keys})) for side in (before, after))
        for place in dict.fromkeys([*was, *now]):
            if was.get(place) != now.get(place):
                label = place.partition(".")[2] or place
                yield Difference(what, (name,), label, was.get(place), now.get(place))


def _together(found: list[Difference]) -> Iterator[Difference]:
    """Equal differences of several stages as one."""
    together: dict[tuple[str, ...], list[Difference]] = {}
    for entry in found:
        together.setdefault((entry.what, entry.name, repr(entry.old), repr(entry.new)), []).append(entry)
    for entries in together.values():
        yield replace(entries[0], stages=tuple(stage for entry in entries for stage in entry.stages))


def _results(store: Store, name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> StageResults:
    before, after = old or {}, new or {}
    ids = [{key: str(value["id"]) for key, value in (side.get("outputs") or {}).items()} for side in (before, after)]
    outputs = {
        key: (ids[0].get(key), ids[1].get(key))
        for key in dict.fromkeys([*ids[0], *ids[1]])
        if ids[0].get(key) != ids[1].get(key)
    }
    measured = [dict(leaves(side.get("metrics") or {})) for side in (before, after)]
    uses = str((after or before)["uses"])
    main = load_stage(uses).headline({**measured[0], **measured[1]}) if uses in STAGES else None
    names = sorted(dict.fromkeys([*measured[0], *measured[1]]), key=lambda key: key != main)
    metrics = {
        key: (measured[0].get(key), measured[1].get(key))
        for key in names
        if key and measured[0].get(key) != measured[1].get(key)
    }
    files = {
        key: _files(store, before["outputs"][key], after["outputs"][key]) for key in outputs if None not in outputs[key]
    }
    states = (before.get("state"), after.get("state"))
    return StageResults(name, states, before.get("fingerprint") == after.get("fingerprint"), outputs, files, metrics)


def _files(store: Store, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The files of two artifacts that differ; empty where one is no longer there."""
    try:
        before, after = (
            {file.path: file.sha256 for file in store.manifest(artifact_of(one)).files} for one in (old, new)
        )
    except PosttrainError:
        return []
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
