"""The plan of an attention whose output is read at some tokens only, as the last layer's is.

A run is a stretch of read tokens within a segment. It attends to itself (causal), to what its segment has before it,
and to the whole of every ancestor; queries that nobody reads are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stages.training.attention_plan import LONGEST_TRIANGLE, Block, Part, Span, causal_blocks, stacked
from stages.training.prefix_tree import Segment, ancestors

WORTH_A_RUN = 16
"""Unread tokens between two read ones up to which one run costs less than two."""


def plan_reads(segments: Sequence[Segment], reads_R: Tensor, longest_triangle: int = LONGEST_TRIANGLE) -> list[Part]:
    """The parts of the attention of the tokens `reads_R` (repetitions do not matter), each with all that it sees."""
    levels: dict[tuple[int, int], list[Block]] = {}
    for index, run in runs(segments, reads_R):
        above = ancestors(segments, index)
        for level, block in causal_blocks(run, longest_triangle):
            levels.setdefault((-1 if block.causal else len(above), level), []).append(block)
        if run[0] > segments[index].start:
            levels.setdefault((len(above), 0), []).append(Block(run, (segments[index].start, run[0])))
        for depth, segment in enumerate(above):
            levels.setdefault((depth, 0), []).append(Block(run, (segment.start, segment.stop)))
    return [part for _, level in sorted(levels.items(), key=lambda item: item[0]) for part in stacked(level)]


def runs(segments: Sequence[Segment], reads_R: Tensor) -> Iterator[tuple[int, Span]]:
    """(segment's index, span) of every run, in the row's order."""
    tokens_R = reads_R.unique()
    if len(tokens_R) == 0:
        return
    starts_S = torch.tensor([segment.start for segment in segments])
    owners_R = torch.searchsorted(starts_S, tokens_R, right=True) - 1
    breaks = ((tokens_R.diff() > WORTH_A_RUN + 1) | (owners_R.diff() != 0)).nonzero()[:, 0] + 1
    bounds = [0, *breaks.tolist(), len(tokens_R)]
    for first, stop in pairwise(bounds):
        yield int(owners_R[first]), (int(tokens_R[first]), int(tokens_R[stop - 1]) + 1)
