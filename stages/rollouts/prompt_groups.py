"""Which rows continue which prompt, as indices for attention: a product of all rows of a prompt with its keys.

P rows of a pass with its padding, S prompts of a span, M rows of a prompt with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """Padding points at row 0."""

    def to(self, device: torch.device) -> Span:
        """The indices on another device."""
        return replace(self, lengths_S=self.lengths_S.to(device), rows_SM=self.rows_SM.to(device))


@dataclass(frozen=True)
class PromptGroups:
    """All prompts that rows continue."""

    spans: list[Span]
    place_P: Tensor
    """Where each row stands among the rows of all spans, one span after the other; padding at 0."""

    def to(self, device: torch.device) -> PromptGroups:
        """The indices on another device."""
        return replace(self, spans=[span.to(device) for span in self.spans], place_P=self.place_P.to(device))


def group_rows(prompt_of_row: Sequence[int], lengths: Sequence[int], rows: int, repeats: int) -> PromptGroups:
    """For `rows` rows with padding, and prompts of these lengths. `repeats`: query heads of one key head."""
    members: list[list[int]] = [[] for _ in lengths]
    for row, prompt in enumerate(prompt_of_row):
        members[prompt].append(row)
    spans, places, before = [], [0] * rows, 0
    for start, stop in _spans(lengths):
        width = _rows_of_a_prompt(max(len(members[prompt]) for prompt in range(start, stop)), repeats)
        table = [members[prompt] + [0] * (width - len(members[prompt])) for prompt in range(start, stop)]
        for prompt in range(start, stop):
            for index, row in enumerate(members[prompt]):
                places[row] = before + (prompt - start) * width + index
        before += width * (stop - start)
        longest = padded_tokens(max(1, *lengths[start:stop]))
        spans.append(Span(start, stop, longest, torch.tensor(lengths[start:stop]), torch.tensor(table)))
    return PromptGroups(spans if max(lengths) > 0 else [], torch.tensor(places))


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
