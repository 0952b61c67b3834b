"""Which model is best: what each evaluation is judged by, model by model, and how each differs from the one it was
trained from, row by row where both left their samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts import Store
from flows.reporting.headline import SECONDARY, Measurement
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import number, plain
from flows.reporting.wiring import Wiring
from flows.trial import LESS_IS_BETTER
from stages.evaluation.paired import Pairs
from stages.evaluation.scores import VERDICTS, Part, row_parts
from stages.stage import STAGES, load_stage

MAX_COLUMNS = 4
MAX_PAIRED = 50_000
"""Samples of one evaluation; of more, differences have no interval."""
FROM = ("model", "models", "teacher", "adapter")
"""Inputs through which a model descends from another, the nearest first."""
SEED = 0
"""Of the bootstrap."""


@dataclass(frozen=True)
class Difference:
    """A metric of a model less that of `model`. `low` and `high`: of the paired bootstrap over the rows that both
    answered; None where these are not known. `better` None: chance alone may be behind it, or nobody can tell."""

    model: str
    value: float
    low: float | None
    high: float | None
    better: bool | None

    @property
    def text(self) -> str:
        """`+0.256 [+0.231, +0.281]`"""
        if self.low is None or self.high is None:
            return _signed(self.value)
        return f"{_signed(self.value)} [{_signed(self.low)}, {_signed(self.high)}]"


@dataclass(frozen=True)
class Cell:
    """A model in a column. `start`, `low` and `high` lie on the column's axis, 0 to 100; `even`: the difference to the
    best may be chance."""

    of: Measurement
    end: float
    low: float | None
    high: float | None
    best: bool
    even: bool
    to_best: Difference | None
    change: Difference | None


@dataclass(frozen=True)
class Column:
    """A metric on a dataset, under the settings that `note` names where another column has others."""

    metric: str
    data: str
    note: str
    lowest: bool
    cells: Mapping[str, Cell]

    @property
    def best(self) -> Cell | None:
        """None where there is nothing to compare."""
        return next((cell for cell in self.cells.values() if cell.best), None)

    @property
    def even(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells.values() if cell.even)


@dataclass(frozen=True)
class Model:
    """A row: what was evaluated, and the stage of this run that made it, if one did."""

    name: str
    stage: str
    uses: str
    identifier: str


@dataclass(frozen=True)
class Scoreboard:
    """`columns`: those of most models first. `left_out`: columns that are not shown."""

    models: tuple[Model, ...]
    columns: tuple[Column, ...]
    left_out: int


def read_scoreboard(
    run: Mapping[str, Any], wiring: Wiring, measurements: Mapping[str, Sequence[Measurement]], store: Store
) -> Scoreboard:
    """Of `Headline.measurements`. What cannot be read has its note with these and with the samples."""
    found = [item for several in measurements.values() for item in several]
    judged = {(name, item.data) for stage, items in measurements.items() for name, item in _judged(run, stage, items)}
    grouped: dict[tuple[str, str, str], dict[str, Measurement]] = {}
    for item in found:
        if (item.metric, item.data) in judged:
            settings = json.dumps(_settings(wiring, item.stage), sort_keys=True, default=str)
            grouped.setdefault((item.metric, item.data, settings), {})[item.model] = item
    pairing = _Pairing(run, store)
    ordered = sorted(grouped, key=lambda key: -len(grouped[key]))
    columns = [_column(key, grouped[key], _note(key, ordered), wiring, pairing) for key in ordered[:MAX_COLUMNS]]
    shown = {name for column in columns for name in column.cells}
    models = {item.model: _model(run, wiring, item) for item in found if item.model in shown}
    return Scoreboard(tuple(models.values()), tuple(columns), len(ordered) - len(columns))


def _judged(run: Mapping[str, Any], stage: str, items: Sequence[Measurement]) -> Iterator[tuple[str, Measurement]]:
    """What stands for an evaluation."""
    by_name = {item.metric: item for item in items}
    uses = str(run["stages"][stage]["uses"])
    main = load_stage(uses).headline(by_name) if uses in STAGES else None
    plain_ones = [name for name in by_name if not name.startswith(SECONDARY)]
    chosen = [main, *(name for name in VERDICTS if name in by_name), *plain_ones, *by_name]
    name = next((name for name in chosen if name is not None), None)
    if name is not None:
        yield name, by_name[name]


def _settings(wiring: Wiring, stage: str) -> Mapping[str, Any]:
    return wiring.settings.get(stage, {}).get("with") or {}


def _note(key: tuple[str, str, str], others: Sequence[tuple[str, str, str]]) -> str:
    """In which settings a column differs from others of its metric and data."""
    alike = [json.loads(settings) for metric, data, settings in others if (metric, data) == key[:2]]
    own = json.loads(key[2])
    names = {name for settings in alike for name in {**settings, **own} if settings.get(name) != own.get(name)}
    return ", ".join(f"{name} {plain(own[name]) if name in own else 'as it is by default'}" for name in sorted(names))


def _column(
    key: tuple[str, str, str], found: Mapping[str, Measurement], note: str, wiring: Wiring, pairing: _Pairing
) -> Column:
    metric, data, _ = key
    lowest = metric.rpartition("/")[2] in LESS_IS_BETTER
    best = (min if lowest else max)(found.values(), key=lambda item: item.value) if len(found) > 1 else None
    edges = [edge for item in found.values() for edge in (item.value, item.low, item.high) if edge is not None]
    low, high = min(0.0, *edges), max(0.0, *edges)
    high = 1.0 if low == 0 and high <= 1 else high

    def at(value: float | None) -> float | None:
        return None if value is None else 100 * (value - low) / ((high - low) or 1.0)

    cells = {}
    for name, item in found.items():
        before = _before(item, found, wiring)
        to_best = None if best is None or item is best else pairing.difference(item, best, lowest)
        cells[name] = Cell(
            of=item,
            end=at(item.value) or 0.0,
            low=at(item.low),
            high=at(item.high),
            best=item is best,
            even=to_best is not None and to_best.low is not None and to_best.better is None,
            to_best=to_best,
            change=None if before is None else pairing.difference(item, before, lowest),
        )
    return Column(metric, data, note, lowest, cells)


def _before(item: Measurement, found: Mapping[str, Measurement], wiring: Wiring) -> Measurement | None:
    """The measurement of the nearest model that this one descends from."""
    by_source = {_source(wiring, other): other for other in found.values() if _source(wiring, other) is not None}
    at, seen = [_source(wiring, item)], set()
    while at:
        stage = at.pop(0)
        if stage is None or stage in seen:
            continue
        seen.add(stage)
        for name in FROM:
            for wire in wiring.wires.get(stage, ()):
                if wire.name != name:
                    continue
                by_label = found.get(wire.label) if wire.source is None else by_source.get(wire.source)
                if by_label is not None and by_label is not item:
                    return by_label
                at.append(wire.source)
    return None


def _source(wiring: Wiring, item: Measurement) -> str | None:
    """The stage that made what was evaluated."""
    wires = [wire for name in ("model", "reward_model") for wire in wiring.wires[item.stage] if wire.name == name]
    return wires[0].source if wires else None


def _model(run: Mapping[str, Any], wiring: Wiring, item: Measurement) -> Model:
    stage = _source(wiring, item) or ""
    wires = [wire for name in ("model", "reward_model") for wire in wiring.wires[item.stage] if wire.name == name]
    uses = str(run["stages"][stage]["uses"]) if stage else "from outside" if wires else ""
    return Model(item.model, stage, uses, (wires[0].identifier if wires else None) or "")


class _Pairing:
    """Differences of measurements; the samples of each are read once."""

    def __init__(self, run: Mapping[str, Any], store: Store) -> None:
        self._run, self._reader = run, Reader(store)
        self._parts: dict[tuple[str, str], dict[str, Part] | None] = {}

    def difference(self, item: Measurement, other: Measurement, lowest: bool) -> Difference:
        value = item.value - other.value
        ours, theirs = self._known(item), self._known(other)
        if not ours or not theirs or ours.keys() != theirs.keys():
            return Difference(other.model, value, None, None, None)
        found = Pairs.of(ours, theirs).difference(SEED)
        apart = found.low > 0 or found.high < 0
        return Difference(other.model, value, found.low, found.high, ((found.low > 0) != lowest) if apart else None)

    def _known(self, item: Measurement) -> dict[str, Part] | None:
        """What each row adds to it; None where it is not what the samples give."""
        key = item.stage, item.metric
        if key not in self._parts:
            outputs = self._run["stages"][item.stage].get("outputs") or {}
            [artifact] = [artifact_of(found) for found in outputs.values() if found["kind"] == "evaluation"][:1]
            lines = self._reader.lines(artifact, "samples.jsonl", item.stage, MAX_PAIRED)
            try:
                parts = row_parts(item.metric, lines)
            except (TypeError, ValueError):
                parts = {}
            total = sum(count for _, count in parts.values())
            mean = math.fsum(value for value, _ in parts.values()) / total if total else math.nan
            self._parts[key] = parts if math.isclose(mean, item.value, rel_tol=1e-6, abs_tol=1e-9) else None
        return self._parts[key]


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{number(abs(float(value)))}"
