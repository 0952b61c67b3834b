"""Whether what a process holds stays the same over many cycles of work.

By the line through the median of all slopes between two samples (Theil-Sen): a few samples taken at a bad moment do not
move it. G11 of the goals: in 1,000 cycles resident memory grows by less than one percent, and handles, threads,
processes and temporary files not at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP_SHARE = 0.4
"""Of the cycles: caches fill, and allocators find their size."""
CYCLES = 1000
MEMORY_SHARE = 0.01
"""By which memory may grow in so many cycles."""
MOST_POINTS = 400
"""Of a longer series every second, third, ... sample is looked at: slopes of all pairs are many."""


@dataclass(frozen=True)
class Series:
    """One figure of one process: `(cycle, value)`. `growth_share`: of its size, in CYCLES cycles; None: it is a
    count, and may not grow by one from the end of warm-up to the end."""

    what: str
    samples: Sequence[tuple[int, float]]
    growth_share: float | None = None


def slope(samples: Sequence[tuple[int, float]]) -> float:
    """The median of the slopes between all pairs of samples, a cycle."""
    return statistics.median(
        (later - earlier) / (second - first)
        for position, (first, earlier) in enumerate(samples)
        for second, later in samples[position + 1 :]
        if second != first
    )


def after_warm_up(samples: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The samples that count, MOST_POINTS at most. Raises ValueError where they are too few to judge."""
    first, last = samples[0][0], samples[-1][0]
    kept = [sample for sample in samples if sample[0] >= first + WARM_UP_SHARE * (last - first)]
    if len(kept) < 10:
        raise ValueError(f"{len(kept)} samples after warm-up say nothing; let it run longer")
    return kept[:: -(-len(kept) // MOST_POINTS)]


def grown(series: Series) -> str | None:
    """In words, how a series is not flat; None: it is."""
    kept = after_warm_up(series.samples)
    steepness, typical = slope(kept), statistics.median(value for _, value in kept)
    if series.growth_share is None:
        growth = steepness * (kept[-1][0] - kept[0][0])
        return f"{series.what}: grew by {growth:.1f} to {kept[-1][1]:g}" if growth >= 1 else None
    share = steepness * CYCLES / typical
    return f"{series.what}: {share:+.2%} in {CYCLES} cycles" if share >= series.growth_share else None


def described(series: Series) -> str:
    """`driver memory: 81.2 MB, +0.31% in 1000 cycles`; a count with its median."""
    kept = after_warm_up(series.samples)
    typical = statistics.median(value for _, value in kept)
    if series.growth_share is None:
        return f"{series.what} {typical:g}"
    return f"{series.what} {typical / 1e6:.1f} MB, {slope(kept) * CYCLES / typical:+.2%} in {CYCLES} cycles"
