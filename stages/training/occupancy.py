"""Who waits for whom: the trainer for rollouts, and what samples them for something to do. Times, so no artifact has
them: they go into the run's timings."""

from __future__ import annotations

import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from stages.rollouts.engine import Engine
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig

WAITING = "rollouts/waiting_seconds"
"""Of the trainer, for rollouts: all of their sampling and scoring where nothing is made ahead."""
SAMPLING = "rollouts/sampling_seconds"
"""That an engine apart from the trainer was busy with completions."""


@contextmanager
def clocked(timings: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """Add what the block takes; no two blocks of one name at once."""
    started = time.monotonic()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.monotonic() - started


def utilization(timings: MutableMapping[str, Any], seconds: float) -> dict[str, float]:
    """Of a run of so many seconds: the shares of them in which the trainer did not wait, and in which the engine
    sampled, and the seconds that it had nothing to do."""
    found = {"rollouts/trainer_utilization": 1 - timings.get(WAITING, 0.0) / seconds}
    if SAMPLING in timings:
        found["rollouts/sampler_utilization"] = timings[SAMPLING] / seconds
        found["rollouts/sampler_idle_seconds"] = seconds - timings[SAMPLING]
    return found


class Clocked:
    """An `Engine` whose time with completions is noted."""

    def __init__(self, engine: Engine, timings: MutableMapping[str, Any]) -> None:
        self._engine, self._timings = engine, timings
        self.load, self.plain_logprobs, self.rest, self.close = (
            engine.load,
            engine.plain_logprobs,
            engine.rest,
            engine.close,
        )

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds."""
        with clocked(self._timings, SAMPLING):
            return self._engine.sample(requests, settings, on_progress)
