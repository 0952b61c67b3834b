"""Whether a run did what it should, and why it had anything to do: what its first sentences say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.causes import input_stages
from flows.entries import BROKEN
from flows.selection import options_in

BEGUN = ("ran", "running", *BROKEN)
MOST = 5
"""Causes that are listed."""


@dataclass(frozen=True)
class Outcome:
    """`causes`: (why stages ran, these stages), those of most stages first; `more` are not listed. `followed`: stages
    that ran only because of what came out of others. `left_out`: stages that the run was not asked for, `options` (as
    given: `--only sft`) why."""

    stages: int
    by_state: tuple[tuple[str, tuple[str, ...]], ...]
    causes: tuple[tuple[str, tuple[str, ...]], ...]
    more: int
    followed: int
    left_out: tuple[str, ...]
    options: str

    def of(self, state: str) -> tuple[str, ...]:
        return dict(self.by_state).get(state, ())

    @property
    def begun(self) -> int:
        return sum(len(self.of(state)) for state in BEGUN)

    @property
    def asked(self) -> int:
        """How many stages the run was about."""
        return self.stages - len(self.left_out)

    @property
    def well(self) -> bool:
        """Whether every stage that it was asked for has what it should make."""
        return len(self.of("ran")) + len(self.of("cached")) == self.asked

    @property
    def not_begun(self) -> tuple[str, ...]:
        """Skipped for another reason than that nobody asked for them."""
        return tuple(name for name in self.of("skipped") if name not in self.left_out)


def read_outcome(run: Mapping[str, Any]) -> Outcome:
    """Of the states and the reasons of a run's stages."""
    states: dict[str, list[str]] = {}
    causes: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    followed = 0
    for name, entry in run["stages"].items():
        states.setdefault(str(entry["state"]), []).append(name)
        reasons = [str(reason) for reason in entry.get("reasons") or ()]
        if entry["state"] == "skipped" and (options := options_in(reasons)) is not None:
            left_out[name] = options
        if entry["state"] not in BEGUN:
            continue
        own = [reason for reason in reasons if not _followed(reason, run)]
        followed += not own and bool(reasons)
        for reason in own:
            causes.setdefault(reason, []).append(name)
    listed = sorted(causes.items(), key=lambda cause: -len(cause[1]))
    return Outcome(
        len(run["stages"]),
        tuple((state, tuple(names)) for state, names in states.items()),
        tuple((reason, tuple(names)) for reason, names in listed[:MOST]),
        max(0, len(listed) - MOST),
        followed,
        tuple(left_out),
        next(iter(left_out.values()), ""),
    )


def _followed(reason: str, run: Mapping[str, Any]) -> bool:
    """Whether it lies in other stages of the run; `input model: a1 -> b2` of something outside is a cause by itself."""
    stages = input_stages(reason)
    return bool(stages) and all(stage in run["stages"] for stage in stages)
