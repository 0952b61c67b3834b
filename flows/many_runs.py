"""`posttrain diff` of many runs, or of a sweep: settings in which they differ, metrics of stages they share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from artifacts import Store
from artifacts.errors import RequestError
from flows.changes import leaves
from flows.closing import main_name
from flows.compare import Difference, causes_between
from flows.standings import Payload, Row, Standings, judged_by, ranked, row_of
from flows.trial import Ranking
from flows.which_run import read_run, seconds_in_all, starts, trials

_FIELD = re.compile(r"stages\.([^.]+)\.with\.(.+)")


@dataclass(frozen=True)
class NamedRuns:
    """Runs, and the sweep whose trials they are, if they are one's."""

    runs: tuple[dict[str, Any], ...]
    sweep: str | None
    starts: tuple[dict[str, Any], ...] = ()
    """All runs of the sweep's trials, those that were interrupted as well."""

    @property
    def are_two(self) -> bool:
        """Two that are asked for one by one: each difference is told, and what followed from it."""
        return self.sweep is None and len(self.runs) == 2


def runs_named(store: Store, references: Sequence[str]) -> NamedRuns:
    """The runs that the references mean, a sweep's name its trials. Raises RequestError."""
    if len(references) == 1 and (one := sweep_named(store, references[0])) is not None:
        return one
    found = [run for name in references for run in trials(starts(store, name)) or [read_run(store, name)]]
    if len(found) < 2:
        raise RequestError(f"{references[0]} is one run, and there is no sweep of that name; give another run as well")
    return NamedRuns(tuple(found), None)


def sweep_named(store: Store, name: str) -> NamedRuns | None:
    """The sweep of that name; None: there is none."""
    begun = starts(store, name)
    return NamedRuns(tuple(trials(begun)), name, tuple(begun)) if begun else None


def compare_many(store: Store, named: NamedRuns) -> Standings:
    """The runs in a table, those of a sweep best first, otherwise in the order given."""
    runs = named.runs
    settings = _settings(store, runs)
    metrics = _metrics(runs)
    if named.sweep is None:
        columns = list(dict.fromkeys(name for found in settings for name in found))
        found = Standings(
            tuple(columns), (), tuple(row_of(run, mine, metrics) for run, mine in zip(runs, settings, strict=True))
        )
        return _apart(found, metrics)
    ranking = Ranking(**runs[-1]["sweep"]["ranking"])
    judged = judged_by(ranking, runs)
    varied = {name for run in runs for name in run["sweep"]["varied"]}
    mine = [{**run["sweep"]["settings"], **_without(found, varied)} for run, found in zip(runs, settings, strict=True)]
    names = list(dict.fromkeys([*([judged] if judged else []), *metrics]))
    rows = [_of_trial(named, run, row_of(run, found, names)) for run, found in zip(runs, mine, strict=True)]
    columns = list(dict.fromkeys(name for found in mine for name in found))
    return _apart(ranked(ranking, judged, rows, columns), names)


def _of_trial(named: NamedRuns, run: Payload, row: Row) -> Row:
    """With the time of all its starts."""
    return replace(row, seconds=seconds_in_all(named.starts, run["sweep"]["settings"], run["recipe_yaml"]))


def varied_in(recipes: Sequence[str]) -> tuple[str, ...]:
    """Places in which recipes, as texts, differ, named as `posttrain diff` names them."""
    written = [dict(leaves(yaml.safe_load(text))) for text in recipes]
    places = dict.fromkeys(place for found in written for place in found)
    return tuple(_key(place) for place in places if len({repr(found.get(place)) for found in written}) > 1)


def _settings(store: Store, runs: Sequence[Payload]) -> list[dict[str, Any]]:
    """Of each run its value of all in which any of them differs from the first."""
    compared = [dict(_named(causes_between(store, runs[0], run))) for run in runs[1:]]
    first = {name: cause.old for found in compared for name, cause in found.items()}
    others = [{name: found[name].new if name in found else first[name] for name in first} for found in compared]
    return [first, *others]


def _named(causes: Sequence[Difference]) -> Iterator[tuple[str, Difference]]:
    for cause in causes:
        if cause.what != "bytes":  # no setting; `posttrain diff` of the two tells it
            yield (f"{cause.stages[0]}.{cause.name}" if cause.stages else _key(cause.name)), cause


def _key(place: str) -> str:
    """`sft.learning_rate` of `stages.sft.with.learning_rate`."""
    found = _FIELD.fullmatch(place)
    return f"{found[1]}.{found[2]}" if found else place


def _metrics(runs: Sequence[Payload]) -> list[str]:
    """The main metric of every stage that all runs have."""
    names = []
    for stage in runs[0]["stages"]:
        entries = [run["stages"].get(stage) for run in runs]
        having = [entry for entry in entries if entry is not None and entry.get("metrics")]
        if None not in entries and having and (name := main_name(having[0])) is not None:
            names.append(f"{stage}.{name}")
    return names


def _apart(found: Standings, metrics: Sequence[str]) -> Standings:
    """What is equal in all rows is no column."""
    same = [name for name in metrics if len({row.metrics.get(name) for row in found.rows}) == 1]
    kept = [name for name in metrics if name not in same or name in found.metrics]
    return replace(found, metrics=tuple(kept), same=tuple(name for name in same if name not in kept))


def _without(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
