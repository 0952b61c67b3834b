"""The judgement of `python -m tests.campaigns soak`, on series made by hand."""

import random

import pytest

from tests.campaigns.flatness import MEMORY_SHARE, Series, floors, grown, slope

MEGABYTE = 1e6


def memory(leak_a_cycle: float, cycles: int = 300, seed: int = 0) -> Series:
    """A process that grows to 100 MB in its first 50 cycles, leaks so many bytes a cycle, and is measured within
    100 kB: now and then (one sample in twenty) in the middle of something that takes 20 MB."""
    draws = random.Random(seed)

    def at(cycle: int) -> float:
        begun = min(cycle, 50) / 50 * 40 * MEGABYTE
        noise = draws.uniform(-1, 1) * 1e5 + (20 * MEGABYTE if draws.random() < 0.05 else 0)
        return 60 * MEGABYTE + begun + leak_a_cycle * cycle + noise

    return Series("memory", [(cycle, at(cycle)) for cycle in range(cycles)], MEMORY_SHARE)


def test_the_slope_is_that_of_most_pairs() -> None:
    # 2 a cycle, but for the third sample: of six slopes 2, 2, 2, and 49, 96, -43 with the outlier
    assert slope([(0, 0.0), (1, 2.0), (2, 98.0), (4, 8.0)]) == 2.0


def test_the_floor_of_a_window_is_what_is_left_when_nothing_is_under_way() -> None:
    # windows of three cycles, but for the last, which is not full
    assert floors([(cycle, cycle // 3 + 5.0 * (cycle % 3)) for cycle in range(91)]) == [
        (3 * window + 1, float(window)) for window in range(30)
    ]
    assert floors([(7, 2.0), (8, 1.0), (9, 3.0)]) == [(7, 2.0), (8, 1.0), (9, 3.0)]


@pytest.mark.parametrize("seed", range(5))
def test_a_thousandth_of_a_percent_a_cycle_is_flat_and_twice_the_limit_is_not(seed: int) -> None:
    # 1 % of 100 MB in 1,000 cycles is 1,000 bytes a cycle
    assert grown(memory(0, seed=seed)) is None
    assert grown(memory(300, seed=seed)) is None
    assert "MB, +" in str(grown(memory(2000, seed=seed)))


@pytest.mark.parametrize(
    ("counts", "flat"),
    [
        ([12] * 200, True),
        ([12 + (cycle % 3) for cycle in range(200)], True),  # connections that come and go
        ([5 + min(cycle, 60) // 10 for cycle in range(200)], True),  # a pool that fills during warm-up
        ([12 + cycle // 50 for cycle in range(200)], False),  # one handle lost in 50 cycles
        ([12 + (cycle % 3) + cycle // 50 for cycle in range(200)], False),
        ([0] * 180 + list(range(20)), True),  # too late to tell from a bad moment: the next minutes show it
        ([0] * 100 + list(range(100)), False),
    ],
)
def test_a_lost_handle_in_fifty_cycles_is_found(counts: list[int], flat: bool) -> None:
    found = grown(Series("handles", list(enumerate(counts))))
    assert (found is None) == flat, found


def worker(step: float, cycles: int = 240) -> Series:
    """Its 190 MB grow by a step with each run, every 20 cycles."""
    return Series("worker memory", [(cycle, 190e6 + cycle // 20 * step) for cycle in range(cycles)], MEMORY_SHARE)


def test_growth_by_steps_is_growth() -> None:
    # 1 % of 190 MB in 1,000 cycles, fifty runs, is 38 kB a run
    assert grown(worker(0)) is None
    assert grown(worker(20e3)) is None
    assert "worker memory 190.5 MB, +1.5" in str(grown(worker(60e3)))


@pytest.mark.parametrize(("full_at", "flat"), [(0, True), (100, True), (10_000, False)])
def test_a_cache_is_judged_by_what_comes_after_it_is_full(full_at: int, flat: bool) -> None:
    # 4 kB a cycle until then, 1.4 % in 1,000; of 300 cycles those from the 120th on count
    kept = [(cycle, 280e6 + 4e3 * min(cycle, full_at)) for cycle in range(300)]
    found = grown(Series("server memory", kept, MEMORY_SHARE))
    assert (found is None) == flat, found


@pytest.mark.parametrize("leak", [0, 300, 2000])
def test_memory_that_is_given_back_every_now_and_then(leak: float) -> None:
    # 100 MB; up to 6 MB are free and kept for seven cycles
    kept = [(cycle, 100e6 + cycle * leak + cycle % 7 * 1e6) for cycle in range(300)]
    found = grown(Series("server memory", kept, MEMORY_SHARE))
    assert (found is None) == (leak < 1000), found


@pytest.mark.parametrize("at", range(0, 300, 20))
def test_a_table_that_is_enlarged_once_is_no_growth_and_hides_none(at: int) -> None:
    # 2 MB of 200 at one cycle, beside 0.2 % and 2 % in 1,000 cycles; 6 MB are too much even once
    for leak, step, flat in ((400, 2e6, True), (4000, 2e6, False), (400, 6e6, at <= 120)):
        kept = [(cycle, 200e6 + cycle * leak + step * (cycle >= at)) for cycle in range(300)]
        found = grown(Series("worker memory", kept, MEMORY_SHARE))
        assert (found is None) == flat, found


def test_too_few_cycles_are_not_judged() -> None:
    with pytest.raises(ValueError, match="say nothing"):
        grown(Series("handles", [(cycle, 1.0) for cycle in range(12)]))
