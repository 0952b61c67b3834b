"""Many calls at once: results in order, failures as such, limits of time, and what outlasts them."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from artifacts.errors import StageError
from stages.rollouts.multi_turn import together as module
from stages.rollouts.multi_turn.together import Together
from stages.rollouts.reward_base import OvertimeError
from tests.rollouts.multi_turn.clocks import stand_still

SHORT = 0.05


def test_calls_run_at_once_and_results_keep_their_order() -> None:
    """Each waits for all others: one after the other, none would come back."""
    meeting = threading.Barrier(3)

    def arrive(name: str) -> str:
        meeting.wait()
        return name

    async def later(name: str) -> str:
        await asyncio.sleep(0)
        return name

    with Together(4) as together:
        found = together([partial(arrive, "a"), partial(later, "b"), partial(arrive, "c"), partial(arrive, "d")], None)
    assert found == ["a", "b", "c", "d"]


def test_not_more_at_once_than_allowed() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1

    with Together(2) as together:
        together([count] * 50, None)
    assert 1 <= most <= 2


def test_failures_are_results() -> None:
    def fails() -> None:
        raise KeyError("x")

    async def leaves() -> None:
        raise SystemExit(3)

    def exits() -> None:
        raise SystemExit("enough")

    with Together(4) as together:
        found = together([fails, leaves, exits, lambda: 1], None)
    assert [type(one) for one in found] == [KeyError, RuntimeError, RuntimeError, int]
    assert str(found[2]) == "SystemExit: enough"


def test_who_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never ends, a coroutine that never ends, and one that refuses to be cancelled."""
    stand_still(monkeypatch, 1)
    forever = threading.Event()

    async def sleeps() -> None:
        await asyncio.Event().wait()

    async def refuses() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            raise ValueError("no") from None

    with Together(4) as together:
        found = together([forever.wait, sleeps, refuses, lambda: "quick"], SHORT)
        assert [type(one) for one in found[:3]] == [OvertimeError] * 3 and found[3] == "quick"
        assert str(found[0]) == "took longer than its limit of 0.05 seconds"
        assert together([lambda: "after"], None) == ["after"]
    forever.set()


def test_too_many_that_go_on_end_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ABANDONED", 2)
    forever = threading.Event()
    with Together(8) as together:
        together([forever.wait] * 2, SHORT)
        with pytest.raises(StageError, match=r"3 calls of tools or environments go on after their time limit of 0.05"):
            together([forever.wait], SHORT)
    forever.set()


def test_async_calls_share_a_loop_over_all_turns() -> None:
    """What one turn opens, the next may use."""

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    with Together(1) as together:
        assert together([loop], None) == together([loop], None)
