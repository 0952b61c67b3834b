"""A trial of a sweep: an ordinary run of the recipe with settings of its own, and what such a run says of itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.plan import Plan
from stages.evaluation.scores import LARGE_IS_BAD

LESS_IS_BETTER = {name.rpartition("/")[2] for name in LARGE_IS_BAD} | {"divergence", "contaminated_rate"}
"""Last parts of the names of such metrics."""


@dataclass(frozen=True)
class Ranking:
    """What trials are ordered by. `metric` None: the one that stands for the stage; `best` None: as the metric's name
    says."""

    stage: str
    metric: str | None = None
    best: str | None = None

    def lowest_first(self, metric: str) -> bool:
        """Whether less of this metric is better."""
        if self.best is not None:
            return self.best == "lowest"
        return metric.rpartition("/")[2] in LESS_IS_BETTER


@dataclass(frozen=True)
class Trial:
    """One combination. Its results get no aliases: `@recipe/stage` stays what runs of the recipe made it."""

    sweep: str
    number: int
    of: int
    texts: Mapping[str, str]
    """Setting -> value as it was written."""
    values: Mapping[str, Any]
    varied: tuple[str, ...]
    """STAGE.FIELD of all that trials differ in, where parameters are filled in."""
    ranking: Ranking
    command: tuple[str, ...]
    """What runs the recipe with these settings, and gives its results their aliases."""
    plan: Plan
    beside: int = 1
    """How many trials may run at once."""

    @property
    def label(self) -> str:
        """`sft.learning_rate=1e-5 beta=0.1`"""
        return " ".join(f"{name}={text}" for name, text in self.texts.items())

    def to_json(self) -> dict[str, Any]:
        """What the trial's run has of it."""
        return {
            "name": self.sweep,
            "trial": self.number,
            "trials": self.of,
            "settings": dict(self.values),
            "varied": list(self.varied),
            "ranking": dict(vars(self.ranking)),
            "command": shlex.join(self.command),
        }
