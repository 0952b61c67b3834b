"""Sums over the tokens of every sequence of a forward pass, however the pass is laid out.

P places of the flattened rows, E values of a place, K sequences (branches with their prefix), S segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.training.batch import TokenBatch
from stages.training.prefix_tree import Segment


class SequenceTotals:
    """[P, E] -> [K, E], as if every sequence had a row of its own: a shared token counts in each sequence that it is
    part of, padding in none. Differentiable."""

    def __init__(self, batch: TokenBatch) -> None:
        device = batch.last_K.device
        positions_P = batch.position_ids_BT.flatten()
        self.tokens_K = positions_P[batch.last_K] + 1
        """Tokens of every sequence."""
        if batch.packed is None:
            rows, width = batch.input_ids_BT.shape
            row_P = torch.arange(rows, device=device).repeat_interleave(width)
            self.segment_P = torch.where(positions_P < self.tokens_K[row_P], row_P, rows)
            self.segments, self.descents = rows + 1, []
        else:
            segments = batch.packed.segments
            lengths = torch.tensor([segment.tokens for segment in segments])
            self.segment_P = torch.arange(len(segments)).repeat_interleave(lengths).to(device, non_blocking=True)
            self.segments, self.descents = (
                len(segments),
                [edges.to(device, non_blocking=True) for edges in _descents(segments)],
            )
        self.last_K = self.segment_P[batch.last_K]

    def __call__(self, values_PE: Tensor) -> Tensor:
        """The sums."""
        sums_SE = values_PE.new_zeros(self.segments, values_PE.shape[1]).index_add(0, self.segment_P, values_PE)
        for children, parents in self.descents:
            sums_SE = sums_SE.index_add(0, children, sums_SE[parents])
        return sums_SE[self.last_K]


def _descents(segments: Sequence[Segment]) -> list[Tensor]:
    """[2, n] (segments, their parents) for every depth below the roots, the upper ones first."""
    depths: list[int] = []
    levels: list[list[tuple[int, int]]] = []
    for index, segment in enumerate(segments):
        depths.append(0 if segment.parent is None else depths[segment.parent] + 1)
        if segment.parent is not None:
            if depths[index] > len(levels):
                levels.append([])
            levels[depths[index] - 1].append((index, segment.parent))
    return [torch.tensor(level).T for level in levels]
