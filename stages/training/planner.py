"""Which rows form which optimizer step, and how a step is cut into micro-batches and spread over processes.

Pure functions of lengths, seed and settings: the same for any number of processes, workers, or resumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

from artifacts.errors import StageError
from stages.seeds import generator


@dataclass(frozen=True)
class RowOrder:
    """An endless stream of rows: a fresh permutation for every epoch, one after the other, cut into steps.

    With `max_steps` None the stream ends after `epochs` passes, so the last step may be short; every row is used
    exactly once an epoch.
    """

    num_rows: int
    batch_size: int
    seed: int
    epochs: float
    max_steps: int | None

    def __post_init__(self) -> None:
        if self.num_rows == 0:
            raise StageError("nothing to train on: the dataset has no usable row; its ledger says why")

    @property
    def total_steps(self) -> int:
        """Steps until the stream ends."""
        return self.max_steps if self.max_steps is not None else math.ceil(self._total_rows / self.batch_size)

    @property
    def _total_rows(self) -> int:
        return math.ceil(self.num_rows * self.epochs)

    def rows(self, step: int) -> list[int]:
        """Row indices of a step (from 0)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        if self.max_steps is None:
            stop = min(stop, self._total_rows)
        return [
            int(_permutation(self.seed, position // self.num_rows, self.num_rows)[position % self.num_rows])
            for position in range(start, stop)
        ]

    def epoch_after(self, step: int) -> float:
        """Passes over the rows once the step is done."""
        return (step + 1) * self.batch_size / self.num_rows


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_rows: int) -> Any:
    return generator(seed, "order", epoch).permutation(num_rows)


def packed_micro_batches(lengths: Sequence[int], budget_tokens: int, least: int = 1) -> list[list[int]]:
    """Indices in micro-batches of at most `budget_tokens` tokens, about equally full, nothing padded.

    At least `least` micro-batches, so that every process gets one (fewer only if there are fewer groups). A group
    longer than the budget has a micro-batch of its own. Longest first onto the emptiest (Graham, 1969).
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alone = [[index] for index in order if lengths[index] >= budget_tokens]
    rest = order[len(alone) :]
    total = sum(lengths[index] for index in rest)
    count = min(len(rest), max(-(-total // budget_tokens), least - len(alone)))
    while rest:
        batches = _spread(rest, lengths, count)
        if max(sum(lengths[index] for index in batch) for batch in batches) <= budget_tokens:
            return [*alone, *batches]
        count += 1
    return alone


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    batches: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for index in order:
        tokens, number = heappop(emptiest)
        batches[number].append(index)
        heappush(emptiest, (tokens + lengths[index], number))
    return batches


def padded_micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Indices in micro-batches whose padded size (rows x longest row) is within the budget: for models that cannot
    take a packed row.

    Rows of like length go together; a row longer than the budget has a micro-batch of its own.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if current and longest * (len(current) + 1) > budget_tokens:
            batches.append(current)
            current = []
        if not current:
            longest = lengths[index]
        current.append(index)
    if current:
        batches.append(current)
    return batches


def share_of_rank(costs: Sequence[int], rank: int, world: int) -> list[int]:
    """Which micro-batches a rank works on: equal in number up to one, the costly ones spread (snake order)."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    mine = []
    for turn, index in enumerate(order):
        lap, place = divmod(turn, world)
        if (place if lap % 2 == 0 else world - 1 - place) == rank:
            mine.append(index)
    return mine
