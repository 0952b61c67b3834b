"""What a stage process comes to: its result, or the way in which it failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from artifacts import Artifact
from artifacts.errors import StageError

Event = dict[str, Any]
"""What a stage says while it runs, by its `kind`: a phase, progress, a line of the log and others."""


class StageFailed(StageError):
    """A stage process ended without a result. `expected`: the message says it all, no traceback is needed.
    `lasting`: it is known that every later try fails too."""

    def __init__(self, message: str, *, expected: bool = False, lasting: bool = False) -> None:
        self.expected, self.lasting = expected, lasting
        super().__init__(message)


class StageOutOfMemory(StageFailed):
    """Memory did not suffice. `smaller`: the micro_batch_tokens to try next; None: no forward pass had begun."""

    def __init__(self, message: str, *, expected: bool = False, smaller: int | None = None) -> None:
        self.smaller = smaller
        super().__init__(message, expected=expected)


class StageInterrupted(StageFailed):
    """Something outside the stage failed that may work when it is tried again: storage, a port, another machine."""


class StageStopped(StageFailed):
    """The stage was stopped because the flow ends; it can be resumed from its last checkpoint."""


@dataclass(frozen=True)
class StageResult:
    """`result.json` of a stage that succeeded, with how it was run."""

    outputs: dict[str, dict[str, str]]
    metrics: dict[str, Any]
    timings: dict[str, Any]
    counts: dict[str, Any]
    resumed_from: int | None
    seconds: float
    command: list[str]

    def artifacts(self) -> dict[str, Artifact]:
        """What it wrote into the store, by name."""
        return {name: Artifact.from_json(found) for name, found in self.outputs.items()}
