"""Which rows continue which prompt, as indices for attention: a product of all rows of a prompt with its keys.

P rows of a pass with its padding, S prompts of a span, M rows of a prompt with padding, R = S M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stages.rollouts.room import TILE, padded_tokens

_LEAST_FILLED = 0.6
"""Prompts of fewer tokens than this share of the longest are attended to apart."""


@dataclass(frozen=True)
class Span:
    """Prompts in slots that follow each other, and their rows."""

    start: int
    stop: int
    tokens: int
    """Of the longest one, padded."""
    lengths_S: Tensor
    rows_SM: Tensor
    """Padding points at the last row of a pass."""

    @cached_property
    def rows_R(self) -> Tensor:
        """Prompt by prompt."""
        return self.rows_SM.flatten()

    def to(self, device: torch.device) -> Span:
        """The indices on another device."""
        return replace(self, lengths_S=self.lengths_S.to(device), rows_SM=self.rows_SM.to(device))


@dataclass(frozen=True)
class PromptGroups:
    """All prompts that rows continue."""

    spans: list[Span]
    place_P: Tensor
    """Where each row stands among the rows of all spans, one span after the other; padding at 0."""
    in_order: bool
    """There is one span, and its rows are those of the pass as they stand."""

    def to(self, device: torch.device) -> PromptGroups:
        """The indices on another device."""
        return replace(self, spans=[span.to(device) for span in self.spans], place_P=self.place_P.to(device))


def group_rows(prompt_of_row: Sequence[int], lengths: Sequence[int], rows: int, repeats: int) -> PromptGroups:
    """For `rows` rows with padding, and prompts of these lengths. `repeats`: query heads of one key head."""
    if max(lengths) == 0:
        return PromptGroups([], torch.zeros(rows, dtype=torch.long), in_order=False)
    members: list[list[int]] = [[] for _ in lengths]
    for row, prompt in enumerate(prompt_of_row):
        members[prompt].append(row)
    if len(lengths) == 1:
        # the rows of padding as well, so that nothing has to be put in order
        members = [list(range(rows))]
    spans, places, before = [], [0] * rows, 0
    for start, stop in _spans(lengths):
        width = _rows_of_a_prompt(max(len(members[prompt]) for prompt in range(start, stop)), repeats)
        table = [members[prompt] + [rows - 1] * (width - len(members[prompt])) for prompt in range(start, stop)]
        for prompt in range(start, stop):
            for index, row in enumerate(members[prompt]):
                places[row] = before + (prompt - start) * width + index
        before += width * (stop - start)
        longest = padded_tokens(max(1, *lengths[start:stop]))
        spans.append(Span(start, stop, longest, torch.tensor(lengths[start:stop]), torch.tensor(table)))
    in_order = len(spans) == 1 and [row for line in table for row in line] == list(range(rows))
    return PromptGroups(spans, torch.tensor(places), in_order)


def _rows_of_a_prompt(rows: int, repeats: int) -> int:
    """Padded so that the queries of a product are a multiple of TILE."""
    while rows * repeats % TILE:
        rows += 1
    return rows


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    start, longest, shortest = 0, lengths[0], lengths[0]
    for index, length in enumerate(lengths):
        longest, shortest = max(longest, length), min(shortest, length)
        if padded_tokens(shortest) < _LEAST_FILLED * padded_tokens(longest):
            spans.append((start, index))
            start, longest, shortest = index, length, length
    return [*spans, (start, len(lengths))]
