"""Time limits of reward functions."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from stages.rollouts.reward_base import OvertimeError

_RINGS_AGAIN_SECONDS = 0.1
"""A function may swallow the first alarm in an `except:` of its own."""
_LEFT_BEHIND_SECONDS = 30.0
"""After its limit, until a function that no exception reaches is left to itself."""


class _Alarm(BaseException):
    """No `except Exception` of a function holds it."""


def limited(compute: Callable[[], Any], seconds: float | None) -> Any:
    """What it returns. Ends it after `seconds`, also an endless loop, and raises OvertimeError. None: no limit.

    In the main thread by an alarm; a timer that somebody else has set goes on afterwards. An alarm reaches no other
    thread; there, see `_limited_aside`.
    """
    if seconds is None:
        return compute()
    if threading.current_thread() is not threading.main_thread():
        return _limited_aside(compute, seconds)
    rang, result = False, None

    def ring(*_: Any) -> None:
        nonlocal rang
        rang = True
        raise _Alarm

    started = time.monotonic()
    others_seconds, others_interval = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, _RINGS_AGAIN_SECONDS)  # a short limit is over in here
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


def _limited_aside(compute: Callable[[], Any], seconds: float) -> Any:
    """In a thread of its own, in which an exception is raised from outside after `seconds`. That ends what is Python; a
    call that waits elsewhere (a socket) is left behind, and ends when it returns."""
    outcome: Future[Any] = Future()
    done = threading.Event()

    def work() -> None:
        try:
            outcome.set_result(compute())
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    if done.wait(seconds):
        thread.join()  # it has nothing more to do, and is gone when this returns
        return outcome.result()
    given_up = time.monotonic() + _LEFT_BEHIND_SECONDS
    while not done.wait(_RINGS_AGAIN_SECONDS) and time.monotonic() < given_up:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Alarm))
    if done.is_set():
        thread.join()
    raise OvertimeError(message(seconds))


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
