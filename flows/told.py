"""SIGTERM, taken once: a run that ends already is not interrupted while it says how its stages ended."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

DEAF_SECONDS = 20.0
"""Longer than a run takes to end its stages and enter it; who asks again after that is heard again."""


@contextlib.contextmanager
def told_once(deaf_seconds: float = DEAF_SECONDS) -> Iterator[None]:
    """Inside, a SIGTERM does what it did before, and others that follow within `deaf_seconds` do nothing.

    Only where SIGTERM has a handler, and in the main thread, which alone may have one.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    first: float | None = None

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None or now - first > deaf_seconds:
            first = now
            handler(number, frame)

    signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
