"""Calls of the user's code, many at once, each with a time limit: plain functions in threads, async ones in one event
loop.

A plain function that outlasts its limit cannot be stopped from outside: nobody waits for it any more, and its thread
goes on beside the run. An async one is cancelled; one that blocks without awaiting holds up all others.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from artifacts.errors import StageError
from stages.rollouts.reward_base import OvertimeError

Task = Callable[[], Any]
"""Gives a result, or something to await."""

MOST_ABANDONED = 64
"""Threads that go on after their time is up; more of them would take the processors from the training."""


class Together:
    """An event loop that lives as long as a generation, so that async environments keep their connections."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._runner = asyncio.Runner()
        self._abandoned: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._runner.close()

    def __call__(self, tasks: Sequence[Task], seconds: float | None) -> list[Any]:
        """Of each task what it gives, or the exception that it raised; OvertimeError where it took longer than
        `seconds` (None: no limit), counted from when it starts."""
        if not tasks:
            return []
        results = self._runner.run(self._all(tasks, seconds))
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) > MOST_ABANDONED:
            raise StageError(
                f"{len(self._abandoned)} calls of tools or environments go on after their time limit of {seconds:g} "
                "seconds; raise the limit, or let them give up by themselves"
            )
        return results

    async def _all(self, tasks: Sequence[Task], seconds: float | None) -> list[Any]:
        gate = asyncio.Semaphore(self._at_once)

        async def one(task: Task) -> Any:
            async with gate:
                return await self._outcome(task, seconds)

        return list(await asyncio.gather(*map(one, tasks)))

    async def _outcome(self, task: Task, seconds: float | None) -> Any:
        if _is_async(task):
            return await _waited(asyncio.ensure_future(_contained(task)), seconds)
        given, thread = _in_thread(task)
        result = await _waited(given, seconds)
        if isinstance(result, OvertimeError) and thread.is_alive():
            self._abandoned.append(thread)
        if inspect.isawaitable(result):
            result = await _waited(asyncio.ensure_future(_contained(lambda: result)), seconds)
        return result


def _is_async(task: Task) -> bool:
    function = getattr(task, "func", task)  # of a partial
    return inspect.iscoroutinefunction(function)


async def _contained(task: Task) -> Any:
    """What it gives, or the exception: also SystemExit, which would end the loop."""
    try:
        return await task()
    except (Exception, SystemExit) as error:
        return _plain(error)


async def _waited(given: asyncio.Future[Any], seconds: float | None) -> Any:
    done, _ = await asyncio.wait([given], timeout=seconds)
    if done:
        return given.result()
    given.cancel()  # not awaited: it may refuse
    return OvertimeError(f"took longer than its limit of {seconds:g} seconds")


def _in_thread(task: Task) -> tuple[asyncio.Future[Any], threading.Thread]:
    """(what a thread of its own will give: a result or an exception as such, the thread). A pool would wait for its
    threads when the process ends."""
    loop = asyncio.get_running_loop()
    given: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any) -> None:
        if not given.done():
            given.set_result(result)

    def work() -> None:
        try:
            result = task()
        except (Exception, SystemExit) as error:
            result = _plain(error)
        with suppress(RuntimeError):  # the loop has ended, nobody waits
            loop.call_soon_threadsafe(settle, result)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return given, thread


def _plain(error: Exception | SystemExit) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"SystemExit: {error}")
