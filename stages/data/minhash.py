"""Pairs of sets that are nearly equal, without comparing each with each: MinHash in bands, every candidate verified.

Broder, 1997; Indyk and Motwani, 1998. Two sets of Jaccard similarity s agree in one band of r numbers with probability
s^r, so b bands miss them with (1 - s^r)^b. What agrees in a band is compared exactly: no pair below the threshold is
reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from artifacts.errors import DataError
from stages.data.shingles import Hashes, Indices
from stages.seeds import generator

NUMBERS = 128
"""Numbers of a signature."""
LARGEST_MISS = 1e-6
"""Probability that a pair just at the threshold is missed, at most."""
MOST_CANDIDATES = 50_000_000
"""Pairs to verify; more are an error that says what to change."""
_BLOCK = 2**20


def numbers_per_band(similarity: float) -> int:
    """The most that still misses a pair at the threshold with a probability of at most LARGEST_MISS."""
    fitting = [r for r in (1, 2, 4, 8, 16, 32) if (1 - similarity**r) ** (NUMBERS // r) <= LARGEST_MISS]
    return max(fitting, default=1)


def signatures(sets: Sequence[Hashes], seed: int) -> Hashes:
    """[N, NUMBERS]: of every set (none empty), the least of its members under each of NUMBERS seeded hashes."""
    draws = generator(seed, "minhash").integers(0, 2**64, (2, NUMBERS), dtype=np.uint64)
    factors, masks = draws[0] | np.uint64(1), draws[1]
    made = np.empty((len(sets), NUMBERS), np.uint64)
    first = 0
    while first < len(sets):
        stop, size = first, 0
        while stop < len(sets) and (size == 0 or size + len(sets[stop]) <= _BLOCK):
            size += len(sets[stop])
            stop += 1
        members = np.concatenate(sets[first:stop])
        starts = np.cumsum([0, *map(len, sets[first : stop - 1])])
        for number in range(NUMBERS):
            mixed = (members ^ masks[number]) * factors[number]
            mixed ^= mixed >> np.uint64(32)
            made[first:stop, number] = np.minimum.reduceat(mixed * factors[number], starts)
        first = stop
    return made


def similar_pairs(
    left: Sequence[Hashes], right: Sequence[Hashes] | None, similarity: float, seed: int
) -> list[tuple[int, int, float]]:
    """(index in left, index in right, Jaccard similarity) of all pairs of at least `similarity`, in order.

    `right` None: pairs inside `left`, the smaller index first. Raises DataError where too many would be verified.
    """
    ours = signatures(left, seed)
    theirs = ours if right is None else signatures(right, seed)
    width = numbers_per_band(similarity)
    keys: set[int] = set()
    for start in range(0, NUMBERS, width):
        found = _agreeing(_band(ours, start, width), _band(theirs, start, width), same=right is None)
        keys.update((found[:, 0] * len(theirs) + found[:, 1]).tolist())
        if len(keys) > MOST_CANDIDATES:
            raise DataError(
                f"more than {MOST_CANDIDATES:,} pairs look alike at similarity {similarity}; raise it, or normalize "
                f"with deduplicate and without what all rows share (system messages, templates)"
            )
    pairs = []
    others = left if right is None else right
    for key in sorted(keys):
        one, other = divmod(key, len(theirs))
        value = jaccard(left[one], others[other])
        if value >= similarity:
            pairs.append((one, other, value))
    return pairs


def jaccard(one: Hashes, other: Hashes) -> float:
    """Members of both over members of either; the sets are sorted and without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _band(signature: Hashes, start: int, width: int) -> Hashes:
    total = np.zeros(len(signature), np.uint64)
    for number in range(start, start + width):
        total = (total ^ signature[:, number]) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def _agreeing(ours: Hashes, theirs: Hashes, *, same: bool) -> Indices:
    """[P, 2] the pairs of equal value; inside one side, those of a smaller and a larger index."""
    order = np.argsort(theirs, kind="stable")
    low, high = (np.searchsorted(theirs[order], ours, side) for side in ("left", "right"))
    counts = high - low
    if int(counts.sum()) > 4 * MOST_CANDIDATES:
        raise DataError("far too many texts look alike to compare them; leave out what all rows share")
    one = np.repeat(np.arange(len(ours)), counts)
    places = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    pairs = np.stack([one, order[places]], axis=1)
    return pairs[pairs[:, 0] < pairs[:, 1]] if same else pairs
