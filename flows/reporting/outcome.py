"""Whether a run did what it should, and why it had anything to do: what its first sentences say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.entries import BROKEN

FOLLOWED = ("input ", "inputs ")
"""How reasons begin that lie in another stage."""
BEGUN = ("ran", "running", *BROKEN)
MOST = 5
"""Causes that are listed."""


@dataclass(frozen=True)
class Outcome:
    """`causes`: (why stages ran, these stages), those of most stages first; `more` are not listed. `followed`: stages
    that ran only because of what came out of others."""

    stages: int
    by_state: tuple[tuple[str, tuple[str, ...]], ...]
    causes: tuple[tuple[str, tuple[str, ...]], ...]
    more: int
    followed: int

    def of(self, state: str) -> tuple[str, ...]:
        return dict(self.by_state).get(state, ())

    @property
    def begun(self) -> int:
        return sum(len(self.of(state)) for state in BEGUN)

    @property
    def well(self) -> bool:
        """Whether every stage has what it should make."""
        return len(self.of("ran")) + len(self.of("cached")) == self.stages


def read_outcome(run: Mapping[str, Any]) -> Outcome:
    """Of the states and the reasons of a run's stages."""
    states: dict[str, list[str]] = {}
    causes: dict[str, list[str]] = {}
    followed = 0
    for name, entry in run["stages"].items():
        states.setdefault(str(entry["state"]), []).append(name)
        if entry["state"] not in BEGUN:
            continue
        own = [str(reason) for reason in entry.get("reasons") or () if not str(reason).startswith(FOLLOWED)]
        followed += not own and bool(entry.get("reasons"))
        for reason in own:
            causes.setdefault(reason, []).append(name)
    listed = sorted(causes.items(), key=lambda cause: -len(cause[1]))
    return Outcome(
        len(run["stages"]),
        tuple((state, tuple(names)) for state, names in states.items()),
        tuple((reason, tuple(names)) for reason, names in listed[:MOST]),
        max(0, len(listed) - MOST),
        followed,
    )
