"""What a training stage leaves as it goes, for whoever looks at a run that goes on, failed or was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.context import Context

METRICS = "metrics.jsonl"
"""In the job folder: one row a logged step, as in the artifact of a run that ends."""
PROGRESS = "progress.json"
"""In a checkpoint: the rows of the steps before it are under `metrics`."""
ROLLOUTS = "rollouts-"
"""How the names of shards with the completions of a generation begin; the number of the generation follows."""


class MetricsLog:
    """The file of rows so far. `before`: those of the steps that a resumed run does not do again."""

    def __init__(self, context: Context, before: Iterable[Mapping[str, float]]) -> None:
        self._path = Path(context.spec.job) / METRICS if context.is_main else None
        if self._path is not None:
            self._path.write_text("".join(_line(row) for row in before), encoding="utf-8")

    def add(self, row: Mapping[str, float]) -> None:
        """One more step; whoever reads the file sees it at once."""
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(row))


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(row) + "\n"
