"""Which rows form which optimizer step, and how a step is cut into micro-batches and spread over processes.

Pure functions of lengths, seed and settings: the same for any number of processes, workers, or resumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from artifacts.errors import StageError
from stages.seeds import generator


def steps_in(num_rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Number of optimizer steps: `max_steps`, or enough for `epochs` passes (the last step may be smaller)."""
    if num_rows == 0:
        raise StageError("nothing to train on: the dataset has no usable row; its ledger says why")
    steps_per_epoch = math.ceil(num_rows / batch_size)
    return max_steps if max_steps is not None else math.ceil(steps_per_epoch * epochs)


def rows_of_step(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Row indices of an optimizer step. Every epoch is a fresh permutation, and an epoch's last step may be short."""
    steps_per_epoch = math.ceil(num_rows / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    order = generator(seed, "order", epoch).permutation(num_rows)
    return [int(row) for row in order[position * batch_size : (position + 1) * batch_size]]


def micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Indices in micro-batches whose padded size (rows x longest row) is within the budget.

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
