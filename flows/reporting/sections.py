"""One section a stage: what it did and why, its configuration, inputs, outputs, numbers and command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.attempts import resumed_at, total_seconds
from flows.closing import main_name
from flows.reporting.declared import declared, record_of
from flows.reporting.reading import TRAINED, Reader, artifact_of
from flows.reporting.text import duration, number, plain, turns, with_intervals
from flows.reporting.unfinished import completions_so_far
from flows.reporting.wiring import Wire, Wiring
from stages.stage import STAGES

MAX_ROLLOUTS = 12
MAX_ROLLOUTS_READ = 20_000


@dataclass(frozen=True)
class Setting:
    """One field of a configuration; nested ones have dotted names."""

    name: str
    value: str
    is_default: bool
    meaning: str
    operational: bool


@dataclass(frozen=True)
class Rollout:
    """One completion sampled while training."""

    step: str
    prompt: tuple[tuple[str, str], ...]
    completion: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """Everything the page says about one stage. Pairs are (name, text)."""

    name: str
    anchor: str
    uses: str
    state: str
    time: str
    fingerprint: str
    reasons: tuple[str, ...]
    headline: str
    """The stage's main metric with its value, if it has both."""
    error: str
    resumed_from: str
    total_time: str
    """With the attempts before, where they are known."""
    settings: tuple[Setting, ...]
    launch: tuple[tuple[str, str], ...]
    inputs: tuple[Wire, ...]
    outputs: tuple[tuple[str, str, str], ...]
    """(output, kind, id)"""
    metrics: tuple[tuple[str, str], ...]
    timings: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    command: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Sections:
    stages: tuple[Section, ...]
    notes: tuple[str, ...]


def read_sections(run: Mapping[str, Any], wiring: Wiring, anchors: Mapping[str, str], reader: Reader) -> Sections:
    """A section for every stage of the run, in the recipe's order."""
    stages = [_section(name, entry, wiring, anchors[name], reader) for name, entry in run["stages"].items()]
    return Sections(tuple(stages), tuple(reader.notes))


def _section(name: str, entry: Mapping[str, Any], wiring: Wiring, anchor: str, reader: Reader) -> Section:
    uses, written = str(entry["uses"]), wiring.settings.get(name, {})
    identity, provenance = record_of(name, uses, entry, reader)
    resumed = resumed_at(entry)
    return Section(
        name=name,
        anchor=anchor,
        uses=uses,
        state=str(entry["state"]),
        time=duration(entry.get("seconds")),
        fingerprint=str(entry.get("fingerprint") or ""),
        reasons=_reasons(entry),
        headline=measure(entry),
        error=str(entry.get("error") or ""),
        resumed_from="" if resumed is None else number(resumed),
        total_time="" if (total := total_seconds(entry)) is None else duration(total),
        settings=tuple(_settings(name, uses, identity.get("config") or {}, written.get("with") or {}, reader)),
        launch=tuple(_pairs(written.get("launch"))),
        inputs=wiring.wires[name],
        outputs=tuple(
            (output, str(value["kind"]), str(value["id"])) for output, value in (entry.get("outputs") or {}).items()
        ),
        metrics=tuple(_pairs(with_intervals(entry.get("metrics") or {}))),
        timings=tuple(_pairs(entry.get("timings"))),
        counts=tuple(_pairs(entry.get("counts"))),
        versions=tuple(_pairs(provenance.get("versions"))),
        command=shlex.join(str(word) for word in entry.get("command") or ()),
        rollouts=tuple(_rollouts(name, entry, reader)),
    )


def _reasons(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One by one where `reason` is all of them in a line; a skipped stage has another one than the plan's."""
    several = [str(reason) for reason in entry.get("reasons") or ()]
    reason = str(entry.get("reason") or "")
    return tuple(several) if reason in ("", "; ".join(several)) else (reason,)


def _settings(
    name: str, uses: str, used: Mapping[str, Any], written: Mapping[str, Any], reader: Reader
) -> Iterator[Setting]:
    """What the recipe says, what the record says, and the defaults, the first of them that has the field."""
    defaults, meanings, operational = declared(name, uses, reader)
    flat_defaults = dict(_flat(defaults))
    values = {**flat_defaults, **dict(_flat(used, defaults)), **dict(_flat(written, defaults))}
    for field in sorted(values, key=lambda field: field in flat_defaults and values[field] == flat_defaults[field]):
        top = field.partition(".")[0]
        is_default = field in flat_defaults and values[field] == flat_defaults[field]
        yield Setting(field, plain(values[field]), is_default, meanings.get(top, ""), top in operational)


def measure(entry: Mapping[str, Any]) -> str:
    """`accuracy 0.712 [0.668, 0.752]`: what stands for a stage; empty where nothing does."""
    metrics = entry.get("metrics") or {}
    name = main_name(entry) if metrics and entry["uses"] in STAGES else None
    found = dict(_pairs({} if name is None else {name: with_intervals(metrics)[name]}))
    return "".join(f"{metric} {value}" for metric, value in found.items())


def _flat(
    values: Mapping[str, Any], shape: Mapping[str, Any] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted fields; a mapping is opened where the default (`shape`, if given) is one too."""
    for name, value in values.items():
        inner = None if shape is None else shape.get(name)
        if isinstance(value, Mapping) and value and (shape is None or isinstance(inner, Mapping)):
            yield from _flat(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _pairs(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and text; a measurement with its interval is one entry, other mappings are opened."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping) and "value" in value:
            interval = [value.get("low"), value.get("high")]
            known = all(edge is not None for edge in interval)
            bounds = f" [{number(interval[0])}, {number(interval[1])}]" if known else ""
            yield f"{prefix}{name}", f"{number(value['value'])}{bounds}"
        elif isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", number(value)


def _rollouts(name: str, entry: Mapping[str, Any], reader: Reader) -> Iterator[Rollout]:
    """Completions from training, evenly from first to last; of an unfinished stage those that it recorded last."""
    yield from map(_rollout, _spread(completions_so_far(name, entry, reader), MAX_ROLLOUTS))
    for output in (entry.get("outputs") or {}).values():
        if output["kind"] in TRAINED:
            rows = list(reader.lines(artifact_of(output), "samples.jsonl", name, MAX_ROLLOUTS_READ))
            yield from map(_rollout, _spread(rows, MAX_ROLLOUTS))


def _rollout(row: Mapping[str, Any]) -> Rollout:
    values = tuple(
        (field, number(value))
        for field, value in row.items()
        if field != "step" and isinstance(value, bool | int | float)
    )
    return Rollout(
        number(row.get("step")),
        tuple(turns(row.get("prompt"))),
        tuple(turns(row.get("completion"))),
        values,
    )


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if len(rows) <= count:
        return list(rows)
    return [rows[index * (len(rows) - 1) // (count - 1)] for index in range(count)]
