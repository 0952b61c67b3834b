"""The curves of a run so far, as monitors look at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

FEW = 20
"""Steps that are compared with those before them."""


class History:
    """Every metric of a run so far, in order. What is no number is in no curve, but in `newest`."""

    def __init__(self) -> None:
        self.newest: Mapping[str, float] = {}
        """The row that was added last."""
        self._values: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}

    def add(self, row: Mapping[str, float]) -> None:
        """The newest step."""
        self.newest = row
        for name, value in row.items():
            if not math.isfinite(value):
                continue
            values = self._values.setdefault(name, [])
            values.append(value)
            if len(values) >= 2 * FEW:
                before = fmean(values[-2 * FEW : -FEW])
                self._best[name] = max(before, self._best.get(name, before))

    def between(self, before: str, after: str) -> list[str]:
        """What stands between the two in the names of metrics: reward functions between `rewards/` and `/std`."""
        return [
            name[len(before) : -len(after)]
            for name in self._values
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
        ]

    def values(self, name: str) -> Sequence[float]:
        """Of a metric, in the steps that have it."""
        return self._values.get(name, ())

    def first(self, name: str) -> float:
        """Mean of its first values."""
        return fmean(self._values[name][:FEW])

    def last(self, name: str, count: int = FEW) -> float:
        """Mean of its newest values."""
        return fmean(self._values[name][-count:])

    def best(self, name: str) -> float:
        """The largest mean of so many values in a row, the newest left out; needs twice as many."""
        return self._best[name]


Monitor = Callable[[History], str | None]
"""A run up to a step -> what is wrong by then, and what to do."""
