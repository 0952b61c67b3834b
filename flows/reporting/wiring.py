"""Who feeds whom: the inputs of a run's stages, resolved to other stages where they come from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from flows.reporting.text import short

EVALUATED = ("model", "reward_model")
"""Inputs that name what an evaluation is about: the first that it has; another one is its judge."""


@dataclass(frozen=True)
class Wire:
    """One artifact that enters a stage. `source` is the stage of this run that wrote it, if one did."""

    name: str
    reference: str
    source: str | None
    identifier: str | None

    @property
    def label(self) -> str:
        return self.reference or short(self.identifier or "")


@dataclass(frozen=True)
class Wiring:
    """The recipe's stages as they were written (`settings`) and the wires between them."""

    settings: Mapping[str, Mapping[str, Any]]
    wires: Mapping[str, tuple[Wire, ...]]
    producers: Mapping[str, str]
    """Artifact id -> the first stage of this run that wrote it, where there is one without having read it."""
    problem: str | None = None

    @property
    def outside(self) -> dict[str, str]:
        """What came from outside the run: id -> how the recipe names it."""
        wires = [wire for found in self.wires.values() for wire in found if wire.source is None]
        return {wire.identifier: wire.reference for wire in wires if wire.identifier and wire.reference}

    def model_of(self, stage: str) -> str | None:
        """The label of what an evaluation evaluated: its model or reward model."""
        for name in EVALUATED:
            for wire in self.wires[stage]:
                if wire.name == name:
                    return wire.label
        return None

    def data_of(self, stage: str) -> str:
        """The label of the datasets that a stage read."""
        return ", ".join(wire.label for wire in self.wires[stage] if wire.name.startswith("dataset"))


def in_order(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run with its stages as the recipe lists them (the store sorts names), unknown ones last."""
    written = list(_settings(run)[0])
    stages = sorted(run["stages"], key=lambda name: written.index(name) if name in written else len(written))
    return {**run, "stages": {name: run["stages"][name] for name in stages}}


def without_handed_on(run: Mapping[str, Any], wiring: Wiring) -> dict[str, Any]:
    """The run without the outputs that a stage had as inputs too and another one made: what a `gate` hands on is shown
    once, where it comes from."""
    stages = {}
    for stage, entry in run["stages"].items():
        read, outputs = _read(entry), entry.get("outputs") or {}
        own = {
            name: output
            for name, output in outputs.items()
            if output["id"] not in read or wiring.producers[str(output["id"])] == stage
        }
        stages[stage] = {**entry, "outputs": own}
    return {**run, "stages": stages}


def _read(entry: Mapping[str, Any]) -> set[str]:
    """The ids of what a stage read."""
    return {str(identifier) for value in (entry.get("inputs") or {}).values() for identifier in _as_list(value)}


def read_wiring(run: Mapping[str, Any]) -> Wiring:
    """From a run's payload: the recipe's text first, ids for what it does not name."""
    stages: Mapping[str, Any] = run["stages"]
    settings, problem = _settings(run)
    producers: dict[str, str] = {}
    for handed_on in (False, True):
        for stage, entry in stages.items():
            for output in (entry.get("outputs") or {}).values():
                if (output["id"] in _read(entry)) == handed_on:
                    producers.setdefault(str(output["id"]), stage)
    wires = {
        stage: tuple(_wires(entry.get("inputs") or {}, settings.get(stage, {}), set(stages), producers))
        for stage, entry in stages.items()
    }
    return Wiring(settings=settings, wires=wires, producers=producers, problem=problem)


def _settings(run: Mapping[str, Any]) -> tuple[dict[str, Mapping[str, Any]], str | None]:
    try:
        recipe = yaml.safe_load(run.get("recipe_yaml") or "") or {}
    except yaml.YAMLError as error:
        return {}, f"the recipe's text is not YAML: {error}"
    written = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(written, dict):
        return {}, "the run holds no recipe text, so the graph follows artifact ids alone"
    return {str(name): entry for name, entry in written.items() if isinstance(entry, dict)}, None


def _wires(
    identifiers: Mapping[str, Any],
    settings: Mapping[str, Any],
    stages: set[str],
    producers: Mapping[str, str],
) -> Iterator[Wire]:
    references = settings.get("inputs") or {}
    for name in dict.fromkeys([*references, *identifiers]):
        written = [str(value) for value in _as_list(references.get(name))]
        known = [str(value) for value in _as_list(identifiers.get(name))]
        for index in range(max(len(written), len(known))):
            reference = written[index] if index < len(written) else ""
            identifier = known[index] if index < len(known) else None
            source = _stage_of(reference, stages)
            if source is None and not reference:
                source = producers.get(identifier or "")
            yield Wire(name, reference or source or short(identifier or ""), source, identifier)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _stage_of(reference: str, stages: set[str]) -> str | None:
    """`sft` and `chats.train` name stages; `@alias`, paths and Hub names do not."""
    for name in (reference, reference.rpartition(".")[0]):
        if name in stages:
            return name
    return None
