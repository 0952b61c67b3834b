"""How much two evaluations differ, row by row where both left their samples, and whether chance alone would do it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from artifacts import Store
from flows.reporting.headline import Measurement
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import number
from stages.evaluation.paired import Pairs
from stages.evaluation.scores import Part, row_parts

MAX_PAIRED = 50_000
"""Samples of one evaluation; of more, differences have no interval."""
SEED = 0
"""Of the bootstrap and of the randomization test."""
FEWEST = 6
"""Rows of fewer cannot tell two models apart, were all better under one: 1/2^5 is more than a 40th."""
CHANCE = 0.025
"""Of one side, as the ends of a 95 % interval have it."""
EXCHANGED = 1_000
"""Where more rows differ, the bootstrap is right by itself."""
DRAWS = 4_000


@dataclass(frozen=True)
class Difference:
    """A metric of a model less that of `model`, over `rows` rows that both answered (0: nobody can say which) of `of`.

    `low` and `high`: of the paired bootstrap; None where these are not known. `better` None: chance alone may be behind
    it, or nobody can tell.
    """

    model: str
    value: float
    low: float | None
    high: float | None
    better: bool | None
    rows: int = 0
    of: int = 0

    @property
    def text(self) -> str:
        """`+0.256 [+0.231, +0.281]`, `... over 199 of 200 rows`"""
        over = f" over {self.rows:,} of {self.of:,} rows" if self.rows < self.of else ""
        if self.low is None or self.high is None:
            return _signed(self.value) + over
        return f"{_signed(self.value)} [{_signed(self.low)}, {_signed(self.high)}]{over}"


class Pairing:
    """Differences of measurements of a run; each is made once, and the samples of each are read once."""

    def __init__(self, run: Mapping[str, Any], store: Store) -> None:
        self._run, self._reader = run, Reader(store)
        self._parts: dict[tuple[str, str], dict[str, Part] | None] = {}
        self._made: dict[tuple[Measurement, Measurement], Difference] = {}

    def difference(self, item: Measurement, other: Measurement, lowest: bool) -> Difference:
        """Of one metric. `lowest`: less of it is better."""
        if (item, other) not in self._made:
            self._made[item, other] = self._difference(item, other, lowest)
        return self._made[item, other]

    def _difference(self, item: Measurement, other: Measurement, lowest: bool) -> Difference:
        ours, theirs = self._known(item) or {}, self._known(other) or {}
        both, of = len(ours.keys() & theirs.keys()), len(ours.keys() | theirs.keys())
        if 2 * both <= max(len(ours), len(theirs)):
            return Difference(other.model, item.value - other.value, None, None, None)
        pairs = Pairs.of(ours, theirs)
        if both < FEWEST:
            value = item.value - other.value if both == of else _mean_difference(pairs)
            return Difference(other.model, value, None, None, None, both, of)
        found = pairs.difference(SEED)
        apart = (found.low > 0 or found.high < 0) and _beyond_chance(pairs, found.value > 0)
        better = ((found.low > 0) != lowest) if apart else None
        return Difference(other.model, found.value, found.low, found.high, better, both, of)

    def _known(self, item: Measurement) -> dict[str, Part] | None:
        """What each row adds to it; None where it is not what the samples give."""
        key = item.stage, item.metric
        if key not in self._parts:
            outputs = self._run["stages"][item.stage].get("outputs") or {}
            [artifact] = [artifact_of(found) for found in outputs.values() if found["kind"] == "evaluation"][:1]
            lines = self._reader.lines(artifact, "samples.jsonl", item.stage, MAX_PAIRED)
            try:
                parts = row_parts(item.metric, lines)
            except (TypeError, ValueError, KeyError, OverflowError):  # samples of another tool
                parts = {}
            total = sum(count for _, count in parts.values())
            mean = math.fsum(value for value, _ in parts.values()) / total if total else math.nan
            self._parts[key] = parts if math.isclose(mean, item.value, rel_tol=1e-6, abs_tol=1e-9) else None
        return self._parts[key]


def _mean_difference(pairs: Pairs) -> float:
    ours = pairs.candidate_sums_R.sum() / pairs.candidate_counts_R.sum()
    return float(ours - pairs.baseline_sums_R.sum() / pairs.baseline_counts_R.sum())


def _beyond_chance(pairs: Pairs, above: bool) -> bool:
    """Whether the randomization test says so too: where few rows differ, the bootstrap is too sure of itself, and of
    one that has all differences alike it has no width at all."""
    few = _differing(pairs)
    if len(few) > EXCHANGED + 1:
        return True
    chance = few.chance_of_more if above else few.chance_of_less
    return chance(0.0, DRAWS, SEED) <= CHANCE


def _differing(pairs: Pairs) -> Pairs:
    """Those rows one by one, and the others as one, in which an exchange changes nothing either."""
    import numpy

    columns = (pairs.candidate_sums_R, pairs.candidate_counts_R, pairs.baseline_sums_R, pairs.baseline_counts_R)
    same_R = (columns[0] == columns[2]) & (columns[1] == columns[3])
    if not same_R.any():
        return pairs
    joined = [numpy.append(column_R[~same_R], column_R[same_R].sum()) for column_R in columns]
    return Pairs(joined[0], joined[1], joined[2], joined[3])


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{number(abs(float(value)))}"
