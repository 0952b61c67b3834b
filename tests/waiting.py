"""Waiting for what other processes and threads do: for an event, and not for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT_SECONDS = 240.0
"""For what takes seconds on a machine that does nothing else: only what never comes takes so long."""
LEFT_SECONDS = 60.0
"""For what has to be gone within ten seconds on such a machine; what is left for good sleeps for minutes."""

Found = TypeVar("Found")


def until(condition: Callable[[], Found | None], seconds: float = LIMIT_SECONDS) -> Found:
    """What the condition gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.05)
    return found
