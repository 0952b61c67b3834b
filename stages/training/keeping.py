"""Which weights a run leaves, and whether it ends early: by rows that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.context import Context
from stages.training.held_out import Measured
from stages.training.model import Scorer
from stages.training.parallel import Parallel

_OF_BEST = "best|"


class Keeping:
    """The best measurement so far (lowest loss, highest reward) and, where they are kept, the weights that had it.

    The first process holds them, in float32 beside the model, and they travel in the checkpoints.
    """

    def __init__(self, context: Context, rows: Measured | None, parallel: Parallel) -> None:
        self.context, self.rows, self.parallel = context, rows, parallel
        self.step, self.best = 0, math.nan
        self.since = 0
        """Measurements since then."""
        self._weights: dict[str, Tensor] = {}

    @property
    def keeps(self) -> bool:
        """Whether the best weights are what the run leaves; where nothing was measured, the last ones are."""
        return self.rows is not None and self.rows.keeps_best and not math.isnan(self.best)

    def load(self, metrics: Sequence[Mapping[str, float]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take up what a saved state has; gives back what else is among the tensors."""
        for row in metrics:
            self._note(row)
        own = {name for name in tensors if name.startswith(_OF_BEST)}
        if self.context.is_main:
            self._weights = {name: tensors[name] for name in own}
        return {name: tensor for name, tensor in tensors.items() if name not in own}

    def look(self, row: Mapping[str, float]) -> None:
        """At a step's metrics, before another one is taken. Collective."""
        if self._note(row) and self.keeps:
            self._take()

    def _note(self, row: Mapping[str, float]) -> bool:
        """Whether it is the best so far."""
        if self.rows is None or self.rows.metric not in row:
            return False
        found = row[self.rows.metric]
        better = math.isnan(self.best) or (found > self.best if self.rows.largest else found < self.best)
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.best = int(row["step"]), found
        return better

    @torch.no_grad()
    def _take(self) -> None:
        """In new memory, for a checkpoint may still be writing the old."""
        found = {}
        for name in self.parallel.shapes():
            weight = self.parallel.weight(name)
            if self.context.is_main:
                found[_OF_BEST + name] = weight.detach().to("cpu", copy=True)
        self._weights = found

    def ends(self, step: int, total: int) -> bool:
        """Whether no measurement was better for as many as the run waits, and it ends after this step."""
        if self.rows is None or self.rows.patience is None or self.since < self.rows.patience:
            return False
        stayed = f"{self.rows.metric} has not {'risen' if self.rows.largest else 'fallen'}"
        self.context.counts["ended_after_step"] = step
        self.context.log(f"ends after step {step} of {total}: {stayed} in {self.since} measurements")
        return True

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return self._weights

    def row(self, metrics: Sequence[dict[str, float]]) -> dict[str, float]:
        """The metrics of the weights that are left."""
        return next(row for row in metrics if row["step"] == self.step) if self.keeps else metrics[-1]

    def trained(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of the rows of all steps those that the weights that are left have seen."""
        return [row for row in rows if not self.keeps or row["step"] <= self.step]

    def _say_kept(self, rows: Measured) -> None:
        if not self.keeps:
            self.context.log(f"no measurement has {rows.metric}: kept are the last weights")
            return
        which = f"the {'highest' if rows.largest else 'lowest'} {rows.metric}"
        self.context.counts["kept_step"] = self.step
        self.context.log(f"kept are the weights of step {self.step}, with {which}: {self.best:.4g}")

    @torch.no_grad()
    def put_into(self, scorer: Scorer | None) -> None:
        """The best weights, where they are kept, into a Scorer of the same model, where there is one."""
        if self.rows is not None and self.rows.keeps_best:
            self._say_kept(self.rows)
        parameters = {} if scorer is None else dict(scorer.named_parameters())
        for name in parameters.keys() & {key.removeprefix(_OF_BEST) for key in self._weights}:
            parameters[name].copy_(self._weights[_OF_BEST + name])
