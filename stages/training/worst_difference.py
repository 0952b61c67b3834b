"""How far the sampler's log-probabilities are from the trainer's in a step, judged where its numbers are known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.training.batch import TokenBatch

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
        """Of a step that is over, by its metrics. Raises StageError where a token of this process is beyond the
        tolerance."""
        noted, self._noted = self._noted, []
        if self.tolerance is None or not means.get(LARGEST, 0.0) > self.tolerance:
            return
        for rows, values in noted:
            difference, branch, token, sampled, computed = values.tolist()
            if difference > self.tolerance:
                raise StageError(
                    f"the sampler gave token {token:.0f} of a completion of row {rows[int(branch)]} log-probability "
                    f"{sampled:.4f}, the {self.computer} {computed:.4f}: the sampler has other weights, or computes "
                    "differently"
                )
