"""What came of `posttrain cancel`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flows.left import Left


@dataclass(frozen=True)
class Answer:
    """What became of it. `state`: `cancelled`, or as it had ended before; `stages`: those that were at work."""

    run: str
    recipe: str | None
    state: str
    stages: tuple[str, ...] = ()
    begun: bool = True
    sweep: str | None = None
    prefect: str | None = None
    """Its name there."""
    process: int | None = None
    """Of this machine, which was told."""
    left: Left | None = field(default=None, compare=False)
    """What is there of its stages; None: the store does not know it."""

    def to_json(self) -> dict[str, Any]:
        """For `posttrain cancel --json`."""
        return {**asdict(self), "stages": list(self.stages)}


def in_words(answer: Answer) -> list[str]:
    """Lines for a terminal."""
    if answer.state != "cancelled" and answer.sweep:
        last = f"its last run {answer.run} ended {answer.state}"
        return [f"no trial of sweep {answer.sweep} is at work ({last}): nothing is left to cancel"]
    if answer.state != "cancelled":
        return [f"run {answer.run} has ended ({answer.state}): nothing is left to cancel"]
    if not answer.begun:
        return [f"cancelled: {answer.run}, which had not begun"]
    stages = f", {', '.join(answer.stages)} at work" if answer.stages else ""
    of = f" ({answer.recipe}{stages})" if answer.recipe else ""
    whole = f"its sweep {answer.sweep} ended with it, for both are one process; " if answer.sweep else ""
    left = "" if answer.left is None else answer.left.in_words()
    again = "give the same command again"
    if answer.left is not None and (forced := answer.left.forced):
        again += f" without `--force` of {', '.join(forced)}, which would begin anew"
    goes_on = f"{whole}to go on, {again}; the next run of its deployment, if any, goes on too"
    return [line for line in (f"cancelled: run {answer.run}{of}; no process of it is left", left, goes_on) if line]
