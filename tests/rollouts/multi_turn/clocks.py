"""Time for the calls of tools and environments, in which no busy machine makes a quick one late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest


class StandingLoop(asyncio.SelectorEventLoop):
    """Its time stands still until so many calls in threads have given something."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._left, self._lock = calls, threading.Lock()
        self._begun, self._went_on = super().time(), None

    def time(self) -> float:
        return self._begun if self._went_on is None else self._begun + super().time() - self._went_on

    def call_soon_threadsafe(self, callback: Callable[..., Any], *given: Any, **how: Any) -> asyncio.Handle:
        handle = super().call_soon_threadsafe(callback, *given, **how)
        with self._lock:
            self._left -= callback.__name__ == "settle"
            if self._left <= 0 and self._went_on is None:
                self._went_on = super().time()
        return handle


def stand_still(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The loop of every generation from now on is such a one."""
    monkeypatch.setattr(asyncio, "Runner", partial(asyncio.Runner, loop_factory=partial(StandingLoop, calls)))
