"""Which rows are kept and which are held out, by what is in them: the order of the source does not matter."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from artifacts.errors import DataError
from stages.seeds import derive


def sample_indices(contents: Sequence[bytes], count: int, seed: int) -> set[int]:
    """`count` of the rows, drawn by seed and content (digests); all when there are no more."""
    seen: Counter[bytes] = Counter()
    ranked = []
    for index, content in enumerate(contents):
        ranked.append((derive(seed, "limit", content.hex(), seen[content]), index))
        seen[content] += 1
    return {index for _, index in heapq.nsmallest(count, ranked)}


def held_out_indices(groups: Sequence[bytes], size: int | float, seed: int) -> set[int]:
    """Rows of the test split: `size` rows, or that fraction of them, in whole groups of equal digest.

    Groups are drawn by seed and digest; one that would exceed the size is left to the training split, so with
    groups the split may be a little smaller. Raises DataError when either split would be empty.
    """
    wanted = size if isinstance(size, int) else max(1, round(size * len(groups)))
    if wanted >= len(groups):
        raise DataError(f"test_size {size} leaves nothing to train on: there are {len(groups)} rows; make it smaller")
    rows_of = Counter(groups)
    chosen: set[bytes] = set()
    left = wanted
    for _, group in sorted((derive(seed, "split", group.hex()), group) for group in rows_of):
        if rows_of[group] <= left:
            chosen.add(group)
            left -= rows_of[group]
        if not left:
            break
    if not chosen:
        raise DataError(
            f"test_size {size} is {wanted} rows and every group has more (the smallest {min(rows_of.values())}); "
            f"raise test_size or group by something finer"
        )
    return {index for index, group in enumerate(groups) if group in chosen}
