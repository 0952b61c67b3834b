"""What a stage shows in Prefect while it works: its log lines, a progress bar, tables, and how its numbers stand."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.prefect_shown import key, only_shown, show_table
from flows.reporting.text import number
from stages.visible import visible

SECONDS_BETWEEN_UPDATES = 2.0
"""Each update of a progress bar is a request to the API."""
PAUSE_FACTOR = 10.0
LONGEST_PAUSE = 300.0
"""A server that is away lets each request wait for a minute, and the stage's next events, and then the next stage with
it: an update is followed by a pause of ten times what it took."""
SECONDS_BETWEEN_NUMBERS = 30.0
"""Numbers are a log line, which stays."""

_LEVELS = {"warning": logging.WARNING, "command": logging.INFO, "log": logging.INFO, "phase": logging.INFO}


class Progress:
    """A stage's log lines and progress bar in Prefect, from the events of its process."""

    def __init__(self, name: str, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._name = name
        self._log = log
        self._bar: UUID | None = None
        self._percent = 0.0
        self._updated = 0.0
        self._pause = SECONDS_BETWEEN_UPDATES
        self._numbers = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None and error is None:
            self._show(100.0)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if event["kind"] in _LEVELS:
            self._log.log(_LEVELS[event["kind"]], "%s", visible(event["text"]))
        elif event["kind"] == "resumed":
            self._log.info("resumed at step %s", event["step"])
        elif event["kind"] == "table":
            self._log.info("%s", visible(event["text"]))
            show_table(event["rows"], event["name"], self._name, title=f"{self._name}: {event['title']}")
        elif event["kind"] == "progress" and event["total"]:
            self._progress(event)

    def _progress(self, event: Mapping[str, Any]) -> None:
        self._percent = 100.0 * event["step"] / event["total"]
        now = time.monotonic()
        if now - self._updated >= self._pause:
            self._show(self._percent)
        if event["values"] and now - self._numbers >= SECONDS_BETWEEN_NUMBERS:
            self._numbers = now
            values = ", ".join(f"{name} {number(value)}" for name, value in event["values"].items())
            self._log.info("%s %s of %s: %s", event["unit"], event["step"], event["total"], values)

    def _show(self, percent: float) -> None:
        began = time.monotonic()
        with only_shown():
            if self._bar is None:
                made = create_progress_artifact(percent, key=key("progress", self._name), description=self._name)
                assert isinstance(made, UUID)
                self._bar = made
            else:
                update_progress_artifact(self._bar, percent)
        self._updated = time.monotonic()
        self._pause = min(max(SECONDS_BETWEEN_UPDATES, PAUSE_FACTOR * (self._updated - began)), LONGEST_PAUSE)
