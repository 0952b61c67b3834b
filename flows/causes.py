"""Causes of a stage's run, as trees: a changed field, or a changed input with what changed in the stage behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.changes import Change


@dataclass(frozen=True)
class Cause:
    """One reason in stage `stage`, in words; `because`: what is behind it, one and the same tuple wherever it is."""

    stage: str
    text: str
    change: Change | None = None
    because: tuple[Cause, ...] = ()

    @property
    def is_input(self) -> bool:
        """Whether the reason lies in another stage, or outside the recipe."""
        return self.change is not None and self.change.kind == "input"

    def line(self) -> str:
        """In one line: `input model changed (because sft: with.learning_rate: 0.001 -> 0.002)`."""
        if not self.is_input or not self.because or self.change is None:
            return self.text
        return f"input {self.change.name} changed (because {_deepest(self.because)})"


def roots(causes: Sequence[Cause]) -> tuple[Cause, ...]:
    """Where they begin: reasons with nothing behind them, each once."""
    found: list[Cause] = []
    seen: set[int] = set()

    def walk(several: Sequence[Cause]) -> None:
        if id(several) in seen:  # two ways lead here
            return
        seen.add(id(several))
        for cause in several:
            if cause.because:
                walk(cause.because)
            else:
                found.append(cause)

    walk(causes)
    return tuple({(cause.stage, cause.text): cause for cause in found}.values())


def to_json(causes: Sequence[Cause], seen: set[int] | None = None) -> list[dict[str, Any]]:
    """The trees as JSON values; what stands further up already is `as_above`."""
    seen = set() if seen is None else seen
    found = []
    for cause in causes:
        change = {} if cause.change is None else cause.change.to_json()
        repeated = bool(cause.because) and id(cause.because) in seen
        seen.add(id(cause.because))
        below: dict[str, Any] = {"as_above": True} if repeated else {"because": to_json(cause.because, seen)}
        found.append({"stage": cause.stage, "text": cause.text, **change, **below})
    return found


def _deepest(causes: Sequence[Cause]) -> str:
    """The reasons of the first stage that has some of its own, on the way back through changed inputs."""
    stage = causes[0].stage
    here = [cause for cause in causes if cause.stage == stage]
    own = [cause.text for cause in here if not cause.is_input]
    if own:
        return f"{stage}: {'; '.join(own)}"
    return _deepest(here[0].because) if here[0].because else f"{stage}: {here[0].text}"
