"""What a run shows in Prefect: the plan with its reasons, progress and log of each stage, results, lineage.

Showing never fails a run: what Prefect does not take is a warning in the log.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.closing import main_metric, short_id

if TYPE_CHECKING:
    from flows.run import Run

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 2.0
"""Each update of a progress bar is a request to the API."""

_LEVELS = {"warning": logging.WARNING, "command": logging.INFO, "log": logging.INFO, "phase": logging.INFO}


class Progress:
    """A stage's log lines and progress bar in Prefect, from the events of its process."""

    def __init__(self, name: str, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._name = name
        self._log = log
        self._bar: UUID | None = None
        self._percent = 0.0
        self._updated = 0.0

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
            self._log.log(_LEVELS[event["kind"]], "%s", event["text"])
        elif event["kind"] == "resumed":
            self._log.info("resumed at step %s", event["step"])
        elif event["kind"] == "table":
            self._log.info("%s", event["text"])
            with _only_shown():
                key = _key(event["name"], self._name)
                create_table_artifact(event["rows"], key=key, description=f"{self._name}: {event['title']}")
        elif event["kind"] == "progress" and event["total"]:
            self._percent = 100.0 * event["step"] / event["total"]
            if time.monotonic() - self._updated >= SECONDS_BETWEEN_UPDATES:
                self._show(self._percent)

    def _show(self, percent: float) -> None:
        self._updated = time.monotonic()
        with _only_shown():
            if self._bar is None:
                self._bar = _id_of(
                    create_progress_artifact(percent, key=_key("progress", self._name), description=self._name)
                )
            else:
                update_progress_artifact(self._bar, percent)


def publish_plan(run: Run) -> None:
    """The decision and the reasons for every stage, as a page of the flow run."""
    rows = [
        f"| {name} | {decision.state} | {_cell('; '.join(decision.reasons))} |"
        for name, decision in run.plan.decisions.items()
    ]
    with _only_shown():
        text = "\n".join(["| stage | decision | why |", "|---|---|---|", *rows])
        create_markdown_artifact(text, key=_key("plan", run.recipe.name), description=f"plan of run {run.id}")


def publish_results(run: Run, payload: Mapping[str, Any]) -> None:
    """The table of metrics, and where each artifact came from."""
    rows = [
        {
            "stage": name,
            "state": entry["state"],
            "seconds": entry["seconds"],
            "main metric": main_metric(entry),
            "artifact": ", ".join(short_id(found["id"]) for found in entry["outputs"].values()),
        }
        for name, entry in payload["stages"].items()
    ]
    with _only_shown():
        create_table_artifact(rows, key=_key("results", run.recipe.name), description=f"run {run.id}")
        create_markdown_artifact(
            "\n".join(_lineage(payload)), key=_key("lineage", run.recipe.name), description=f"run {run.id}"
        )


def _lineage(payload: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in payload["stages"].items():
        for output, found in entry["outputs"].items():
            yield f"- **{name}.{output}** `{short_id(found['id'])}` ({found['kind']}) by `{entry['uses']}`"
            for given, references in entry["inputs"].items():
                names = ", ".join(f"`{_short(reference)}`" for reference in references)
                yield f"    - {given}: {names}"


def _short(reference: str) -> str:
    return short_id(reference) if reference.startswith("sha256:") else reference


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _key(*parts: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _id_of(found: Any) -> UUID:
    assert isinstance(found, UUID)
    return found


@contextlib.contextmanager
def _only_shown() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("Prefect did not take what the run wanted to show: %s", error)
