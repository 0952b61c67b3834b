"""What wants to know how a run goes on: the terminal, a test, a program of a user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flows.decision import Decision
    from flows.entries import Entry


class Listener(Protocol):
    """What wants to know how a run goes on. Called from several threads."""

    def planned(self, decisions: Mapping[str, Decision]) -> None:
        """Before anything runs."""

    def started(self, name: str, reason: str) -> None:
        """A stage is about to be worked on."""

    def event(self, name: str, event: Mapping[str, Any]) -> None:
        """A stage process reported: `command`, `phase`, `progress`, `log`, `micro_batch`, `resumed`, `warning`."""

    def ended(self, name: str, entry: Entry) -> None:
        """A stage is over; `entry` is its part of the payload."""

    def finished(self, payload: Mapping[str, Any]) -> None:
        """The run is over, well or not."""


class Silence:
    """The listener that does nothing."""

    def planned(self, decisions: Mapping[str, Decision]) -> None: ...
    def started(self, name: str, reason: str) -> None: ...
    def event(self, name: str, event: Mapping[str, Any]) -> None: ...
    def ended(self, name: str, entry: Entry) -> None: ...
    def finished(self, payload: Mapping[str, Any]) -> None: ...
