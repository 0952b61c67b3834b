"""How far the sampler's log-probabilities are from the trainer's in a step, judged where its numbers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.training.batch import TokenBatch
from stages.training.processes import gathered

LARGEST = "sampling/sampling_logp_difference/max"
"""The metric, an Extreme of the step."""


class WorstDifference:
    """Keeps the worst token of every batch of a step on the device, for to look at it would wait for the batch."""

    def __init__(self, tolerance: float | None, computer: str) -> None:
        """`computer`: who computes what the sampler gave; None: any difference will do."""
        self.tolerance, self.computer = tolerance, computer
        self._noted: list[tuple[list[str], Tensor]] = []
        """Rows of a batch's branches; difference, branch, token and both log-probabilities of its worst token."""

    def note(self, batch: TokenBatch, sampled_N: Tensor, computed_N: Tensor) -> None:
        """Of the batch's asked-for tokens."""
        if self.tolerance is None or not len(sampled_N):
            return
        differences_N = (computed_N - sampled_N).abs()
        worst = differences_N.argmax(keepdim=True)
        parts = (differences_N, batch.branch_N, batch.target_N, sampled_N, computed_N)
        rows = [group.row_id for group in batch.groups for _ in group.branches]
        self._noted.append((rows, torch.cat([one.detach().index_select(0, worst).double() for one in parts])))

    def require(self, means: Mapping[str, float]) -> None:
        """Of a step's batches, by its metrics, which are those of all processes. Collective where the largest
        difference is beyond the tolerance. Raises the same StageError on every process where a noted token is."""
        noted, self._noted = self._noted, []
        if self.tolerance is None or not means.get(LARGEST, 0.0) > self.tolerance:
            return
        own = max(((rows, values.tolist()) for rows, values in noted), key=_difference, default=None)
        found = None if own is None else (own[0][int(own[1][1])], own[1])
        rows_and_values = [one for one in gathered(found) if one is not None]
        row, (difference, _, token, sampled, computed) = max(rows_and_values, key=_difference, default=("", [0.0] * 5))
        if difference > self.tolerance:
            raise StageError(
                f"the sampler gave token {token:.0f} of a completion of row {row} log-probability {sampled:.4f}, the "
                f"{self.computer} {computed:.4f}: the sampler has other weights, or computes differently"
            )


def _difference(noted: tuple[Any, list[float]]) -> float:
    return noted[1][0]
