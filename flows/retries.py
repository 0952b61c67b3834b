"""A stage that failed through no fault of its own is started again, from its last checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flows.stage_result import Event, StageInterrupted, StageResult, StageStopped


def with_retries(
    start: Callable[[], StageResult],
    retries: int,
    delay_seconds: float,
    stopping: threading.Event,
    tell: Callable[[Event], None],
) -> StageResult:
    """`start()`, up to `retries` times more where it raises StageInterrupted, after pauses that double.

    Everything else, a wrong setting or too little memory, fails again and is raised at once. Raises StageStopped where
    the run ends meanwhile.
    """
    for attempt in range(1, retries + 1):
        try:
            return start()
        except StageInterrupted as error:
            pause = delay_seconds * 2 ** (attempt - 1)
            text = f"{error}; this may pass: trying again in {pause:.0f} s ({attempt} of {retries})"
            tell({"kind": "warning", "text": text})
            if stopping.wait(pause):
                raise StageStopped(f"{error}; it was not tried again: the run ended", expected=True) from error
    return start()
