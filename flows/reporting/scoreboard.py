"""Which model is best: what each evaluation is judged by, model by model, and how each differs from the one it was
trained from, row by row where both left their samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts import Store
from flows.reporting.comparable import Comparable, comparable
from flows.reporting.differences import Difference, Pairing
from flows.reporting.headline import SECONDARY, Measurement
from flows.reporting.reading import Reader
from flows.reporting.wiring import EVALUATED, Wire, Wiring
from flows.trial import LESS_IS_BETTER
from stages.evaluation.scores import VERDICTS
from stages.stage import STAGES, load_stage

MAX_COLUMNS = 4
FROM = ("model", "models", "teacher", "adapter")
"""Inputs through which a model descends from another, the nearest first."""


@dataclass(frozen=True)
class Cell:
    """A model in a column. `end`, `low` and `high` lie on the column's axis, 0 to 100. `best`: as good as any; `even`:
    the difference to the best may be chance."""

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
    def best(self) -> tuple[Cell, ...]:
        """Several where they are equal; none where there is nothing to compare."""
        return tuple(cell for cell in self.cells.values() if cell.best)

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
    chosen = [item for item in found if (item.metric, item.data) in judged]
    pairing = Pairing(run, store)
    groups = comparable(chosen, run, wiring, Reader(store))
    columns = [_column(group, wiring, pairing) for group in groups[:MAX_COLUMNS]]
    shown = {name for column in columns for name in column.cells}
    models = {item.model: _model(run, wiring, item) for item in found if item.model in shown}
    return Scoreboard(tuple(models.values()), tuple(columns), len(groups) - len(columns))


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


def _column(group: Comparable, wiring: Wiring, pairing: Pairing) -> Column:
    found = group.found
    lowest = group.metric.rpartition("/")[2] in LESS_IS_BETTER
    best = (min if lowest else max)(found.values(), key=lambda item: item.value) if len(found) > 1 else None
    edges = [edge for item in found.values() for edge in (item.value, item.low, item.high) if edge is not None]
    low, high = min(0.0, *edges), max(0.0, *edges)
    high = 1.0 if low == 0 and high <= 1 else high

    def at(value: float | None) -> float | None:
        return None if value is None else 100 * (value - low) / ((high - low) or 1.0)

    cells = {}
    for name, item in found.items():
        before = _before(item, found, wiring)
        is_best = best is not None and item.value == best.value
        to_best = None if best is None or is_best else pairing.difference(item, best, lowest)
        cells[name] = Cell(
            of=item,
            end=at(item.value) or 0.0,
            low=at(item.low),
            high=at(item.high),
            best=is_best,
            even=best is not None and to_best is not None and _is_even(to_best, item, best),
            to_best=to_best,
            change=None if before is None else pairing.difference(item, before, lowest),
        )
    return Column(group.metric, group.data, group.note, lowest, cells)


def _is_even(to_best: Difference, item: Measurement, best: Measurement) -> bool:
    """Whether the rows that both answered cannot tell them apart, or, where these are not known, the intervals."""
    if to_best.rows:
        return to_best.better is None
    if item.low is None or item.high is None or best.low is None or best.high is None:
        return False
    return item.low <= best.high and best.low <= item.high


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


def _evaluated(wiring: Wiring, stage: str) -> Wire | None:
    """What an evaluation evaluated."""
    wires = [wire for name in EVALUATED for wire in wiring.wires[stage] if wire.name == name]
    return wires[0] if wires else None


def _source(wiring: Wiring, item: Measurement) -> str | None:
    """The stage that made what was evaluated."""
    wire = _evaluated(wiring, item.stage)
    return None if wire is None else wire.source


def _model(run: Mapping[str, Any], wiring: Wiring, item: Measurement) -> Model:
    wire = _evaluated(wiring, item.stage)
    if wire is None:
        return Model(item.model, "", "", "")
    uses = str(run["stages"][wire.source]["uses"]) if wire.source else "from outside"
    return Model(item.model, wire.source or "", uses, wire.identifier or "")
