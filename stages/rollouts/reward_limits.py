"""Time limits of reward functions."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from artifacts.errors import StageError
from stages.rollouts.reward_base import OvertimeError

_RINGS_AGAIN_SECONDS = 0.1
"""A function may swallow the first alarm in an `except:` of its own."""


class _Alarm(BaseException):
    """No `except Exception` of a function holds it."""


def limited(compute: Callable[[], Any], seconds: float | None) -> Any:
    """What it returns. Ends it after `seconds`, also an endless loop, and raises OvertimeError. None: no limit.

    By an alarm, which reaches the main thread only; a timer that somebody else has set goes on afterwards.
    """
    if seconds is None:
        return compute()
    if threading.current_thread() is not threading.main_thread():
        raise StageError("timeout_seconds of a reward works in the main thread only; call from there, or leave it out")
    rang, result = False, None

    def ring(*_: Any) -> None:
        nonlocal rang
        rang = True
        raise _Alarm

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    others_seconds, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds, _RINGS_AGAIN_SECONDS)
    try:
        try:
            result = compute()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Alarm:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if others_seconds:
            left = max(others_seconds - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, others_interval)
    if rang:
        raise OvertimeError(message(seconds))
    return result


async def awaited(waiting: Awaitable[Any], seconds: float | None) -> Any:
    """What it gives. Raises OvertimeError when it has not come after `seconds`."""
    try:
        async with asyncio.timeout(seconds) as clock:
            return await waiting
    except TimeoutError as error:
        if clock.expired() and seconds is not None:
            raise OvertimeError(message(seconds)) from error
        raise


def message(seconds: float) -> str:
    """What is said of a reward that takes longer."""
    return f"took longer than its limit, timeout_seconds: {seconds:g}"
