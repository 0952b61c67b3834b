"""Whether what a process holds stays the same over many cycles of work.

By the least of the samples of each window, which is what is left when all that is free has been given back and nothing
is under way: where that rises, something stays. The line through these is that of the median of all slopes between two
of them (Theil-Sen). A step of memory that comes once is taken out before, and said: Python enlarges a table, by 2 MB,
once in hundreds of cycles. G11 of the goals: in 1,000 cycles resident memory grows by less than one percent, and
handles, threads, processes and temporary files not at all.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP_SHARE = 0.4
"""Of the cycles: caches fill, and allocators find their size."""
CYCLES = 1000
MEMORY_SHARE = 0.01
"""By which memory may grow in so many cycles."""
STEP_SHARE = 0.02
"""Of its size: what memory may grow by in one step."""
STANDS_OUT = 3
"""Times the next largest rise from one window to the next: a rise as large is a step."""
WINDOWS = 30
"""Into which a series is cut."""


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


def floors(samples: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """`(cycle in the middle, least value)` of each window; windows of one sample where there are few."""
    size = max(1, len(samples) // WINDOWS)
    windows = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
    return [(window[size // 2][0], min(value for _, value in window)) for window in windows]


def after_warm_up(samples: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The floors that count. Raises ValueError where they are too few to judge."""
    first, last = samples[0][0], samples[-1][0]
    kept = [sample for sample in floors(samples) if sample[0] >= first + WARM_UP_SHARE * (last - first)]
    if len(kept) < 10:
        raise ValueError(f"{len(kept)} samples after warm-up say nothing; let it run longer")
    return kept


def without_a_step(kept: Sequence[tuple[int, float]]) -> tuple[list[tuple[int, float]], float]:
    """The same without the one rise that stands out, and how large that is (0: none does)."""
    rises = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(kept)]
    *_, next_largest, step = sorted(rises)
    if step <= STANDS_OUT * max(next_largest, 0):
        return list(kept), 0
    at = rises.index(step)
    return [(cycle, value - step if position > at else value) for position, (cycle, value) in enumerate(kept)], step


def shares(series: Series) -> tuple[float, float]:
    """Of its size: how much memory grows in CYCLES cycles, and by how much in one step besides."""
    kept = after_warm_up(series.samples)
    typical = statistics.median(value for _, value in kept)
    rest, step = without_a_step(kept)
    return slope(rest) * CYCLES / typical, step / typical


def grown(series: Series) -> str | None:
    """In words, how a series is not flat; None: it is."""
    if series.growth_share is None:
        kept = after_warm_up(series.samples)
        growth = slope(kept) * (kept[-1][0] - kept[0][0])
        return f"{series.what}: grew by {growth:.1f} to {kept[-1][1]:g}" if growth >= 1 else None
    share, step = shares(series)
    return None if share < series.growth_share and step < STEP_SHARE else described(series)


def described(series: Series) -> str:
    """`driver memory 81.2 MB, +0.31% in 1000 cycles, +0.80% once`; a count with its median."""
    typical = statistics.median(value for _, value in after_warm_up(series.samples))
    if series.growth_share is None:
        return f"{series.what} {typical:g}"
    share, step = shares(series)
    once = f", {step:+.2%} once" if step else ""
    return f"{series.what} {typical / 1e6:.1f} MB, {share:+.2%} in {CYCLES} cycles{once}"
