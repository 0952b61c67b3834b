"""Causes of a stage's run, as trees: a changed field, or a changed input with what changed in the stage behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flows.changes import Change

_INPUT_LINE = re.compile(r"inputs? ([^:]+?) (?:changed|may change)(?: \(.*\))?", re.DOTALL)


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
        """In one line: `input sft changed`, and where it begins if that is further back: `(rows did)`."""
        if not self.is_input or not self.because:
            return self.text
        sources = dict.fromkeys(cause.stage for cause in self.because)
        begin = [stage for stage in dict.fromkeys(_beginning(self.because)) if stage not in sources]
        return input_line(sources, "changed", f"{', '.join(begin)} did" if begin else "")


def input_line(stages: Iterable[str], what: str, behind: str = "") -> str:
    """`input sft may change (rows will run)`"""
    listed = list(stages)
    return f"input{'s' * (len(listed) > 1)} {', '.join(listed)} {what}{f' ({behind})' if behind else ''}"


def input_stages(reason: str) -> list[str]:
    """The names that an `input_line` lists; none where a reason is of another form, as `input model: a1 -> b2` is."""
    found = _INPUT_LINE.fullmatch(reason)
    return [] if found is None else found[1].split(", ")


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


def _beginning(causes: Sequence[Cause]) -> Iterator[str]:
    """Stages with reasons of their own, the first on each way back through changed inputs."""
    own = [cause.stage for cause in causes if not cause.is_input]
    if own:
        yield from own
        return
    for cause in causes:
        if cause.because:
            yield from _beginning(cause.because)
        else:
            yield cause.stage
