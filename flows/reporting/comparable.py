"""Which measurements may be compared: one metric on one dataset, under settings and by judges that give one number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.reporting.declared import declared, record_of
from flows.reporting.headline import Measurement
from flows.reporting.reading import Reader
from flows.reporting.text import plain
from flows.reporting.wiring import EVALUATED, Wiring

REFERENCES = ("reference", "reference_logprobs")
"""Inputs that a policy's margins are counted from; a reward model has none and is compared with it all the same."""

MOST = 3
"""Evaluations that a note names."""


@dataclass(frozen=True)
class Comparable:
    """`found`: model -> its measurement. `note`: what the numbers were made under, where others of the metric and the
    data were made under something else."""

    metric: str
    data: str
    note: str
    found: Mapping[str, Measurement]


@dataclass(frozen=True)
class _Condition:
    """`key` is equal where it gives equal numbers, `words` are for people."""

    key: str
    words: str


Conditions = Mapping[str, _Condition]


def comparable(
    items: Sequence[Measurement], run: Mapping[str, Any], wiring: Wiring, reader: Reader
) -> list[Comparable]:
    """Every measurement in one of them; those of most models first."""
    under = {stage: _conditions(stage, run, wiring, reader) for stage in dict.fromkeys(item.stage for item in items)}
    groups: list[list[Measurement]] = []
    for alike in _grouped(items, lambda item: (item.metric, item.data, _key(under[item.stage], references=False))):
        groups += _apart(alike, under)
    found: list[Comparable] = []
    for group in groups:
        note = _note(group, groups, under)
        if any((other.metric, other.data, other.note) == (*_of(group), note) for other in found):
            note = ", ".join(filter(None, [note, f"by {_listed([item.stage for item in group])}"]))
        found.append(Comparable(*_of(group), note, {item.model: item for item in group}))
    return sorted(found, key=lambda one: -len(one.found))


def _conditions(stage: str, run: Mapping[str, Any], wiring: Wiring, reader: Reader) -> Conditions:
    """Fields that are part of what a result is, defaults filled in, and inputs but for what was evaluated on what."""
    entry = run["stages"][stage]
    uses, written = str(entry["uses"]), wiring.settings.get(stage, {}).get("with") or {}
    identity, _ = record_of(stage, uses, entry, reader)
    defaults, _, operational = declared(stage, uses, reader)
    values = {**defaults, **written, **(identity.get("config") or {})}
    found = {
        name: _Condition(json.dumps(value, sort_keys=True, default=str), plain(written.get(name, value)))
        for name, value in values.items()
        if name not in operational
    }
    evaluated = next((name for name in EVALUATED if any(wire.name == name for wire in wiring.wires[stage])), None)
    for name in dict.fromkeys(wire.name for wire in wiring.wires[stage]):
        wires = [wire for wire in wiring.wires[stage] if wire.name == name]
        if name != evaluated and not name.startswith("dataset"):
            key = json.dumps([wire.identifier or wire.label for wire in wires])
            found[name] = _Condition(key, ", ".join(wire.label for wire in wires))
    return found


def _key(conditions: Conditions, *, references: bool) -> tuple[tuple[str, str], ...]:
    """Of the references alone, or of all else."""
    return tuple(sorted((name, one.key) for name, one in conditions.items() if (name in REFERENCES) == references))


def _grouped(items: Iterable[Measurement], key: Callable[[Measurement], Any]) -> list[list[Measurement]]:
    groups: dict[Any, list[Measurement]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _apart(items: Sequence[Measurement], under: Mapping[str, Conditions]) -> list[list[Measurement]]:
    """No model twice: by reference where that tells them apart, and then evaluation by evaluation."""
    if len({item.model for item in items}) == len(items):
        return [list(items)]
    found: list[list[Measurement]] = []
    for alike in _grouped(items, lambda item: _key(under[item.stage], references=True)):
        layers: list[list[Measurement]] = []
        for item in alike:
            free = (layer for layer in layers if all(other.model != item.model for other in layer))
            layer = next(free, None)
            if layer is None:
                layers.append([item])
            else:
                layer.append(item)
        found += layers
    return found


def _listed(stages: Sequence[str]) -> str:
    return ", ".join(stages[:MOST]) + (f" and {len(stages) - MOST} more" if len(stages) > MOST else "")


def _of(group: Sequence[Measurement]) -> tuple[str, str]:
    return group[0].metric, group[0].data


def _note(
    group: Sequence[Measurement], groups: Sequence[Sequence[Measurement]], under: Mapping[str, Conditions]
) -> str:
    """What all of its measurements share, and others of its metric and data do not."""
    others = [item for other in groups if other is not group and _of(other) == _of(group) for item in other]
    names = sorted({name for item in (*group, *others) for name in under[item.stage]})
    said = []
    for name in names:
        own = {_key_of(under[item.stage], name) for item in group}
        if len(own) == 1 and any(_key_of(under[item.stage], name) not in own for item in others):
            one = under[group[0].stage].get(name)
            said.append(f"no {name}" if one is None else f"{name} {one.words}")
    return ", ".join(said)


def _key_of(conditions: Conditions, name: str) -> str | None:
    return conditions[name].key if name in conditions else None
