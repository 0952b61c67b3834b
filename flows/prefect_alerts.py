"""Who is told when a deployed run fails: `posttrain ui` looks for such runs and posts them to an address.

Not by an automation of Prefect's: those wait for events that a run of a fresh schedule never had, and on SQLite one
event may fire one several times.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from flows.prefect_upkeep import deployment_named

LOOK_SECONDS = 5.0
"""Between two looks."""
POST_SECONDS = 10.0
MOST_TRIES = 10
"""Looks at which an address is tried that does not take what is posted."""
_KEPT = "alerts.json"
_OVERLAP = timedelta(minutes=10)
"""How far back a look goes behind the last one: an end may be written down some time after it."""
_BEFORE_THE_REASON = re.compile(r"^Flow run encountered an exception: (\w+: )?")


class Alerts:
    """Every deployed run that failed or crashed, once; what was told is noted in `home`."""

    def __init__(self, url: str, address: str, home: Path, say: Callable[[str], None]) -> None:
        """`address`: of Prefect's pages. What is secret of `url` is never said."""
        self.url, self.address, self.say = url, address, say
        self.host = urlsplit(url).hostname
        self._note = home / _KEPT
        self._told: dict[str, str] = {}
        """Run -> when it ended; of those that a look might find again."""
        self._tries: dict[UUID, int] = {}
        self._since = datetime.now(UTC)
        if self._note.is_file():
            self._read()

    def look(self, client: SyncPrefectClient) -> None:
        """Tell of what ended badly since the last look."""
        now = datetime.now(UTC)
        runs = [run for run in self._failed(client) if str(run.id) not in self._told]
        for run in runs:
            if run.deployment_id is None or self._is_told(client, run):
                self._told[str(run.id)] = (run.end_time or now).isoformat()
        if not self._tries:
            self._since = max(self._since, now - _OVERLAP)
            self._told = {run: end for run, end in self._told.items() if datetime.fromisoformat(end) >= self._since}
        self._write()

    def _read(self) -> None:
        try:
            noted = json.loads(self._note.read_text(encoding="utf-8"))
            self._since, self._told = datetime.fromisoformat(noted["since"]), dict(noted["told"])
        except (ValueError, KeyError, TypeError):
            self.say(f"{self._note} is damaged; runs that failed before now are not told")

    def _write(self) -> None:
        beside = self._note.with_name(f"{_KEPT}.new")
        beside.write_text(json.dumps({"since": self._since.isoformat(), "told": self._told}), encoding="utf-8")
        os.replace(beside, self._note)

    def _failed(self, client: SyncPrefectClient) -> list[FlowRun]:
        ends = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.FAILED, StateType.CRASHED]))
        wanted = FlowRunFilter(state=ends, end_time=FlowRunFilterEndTime.model_validate({"after_": self._since}))
        return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.END_TIME_DESC)[::-1]

    def _is_told(self, client: SyncPrefectClient, run: FlowRun) -> bool:
        """Whether it needs no further look: the address has it, or never took it."""
        problem = self._post(_in_words(client, run) + f"\n{self.address}/runs/flow-run/{run.id}")
        tries = self._tries.pop(run.id, 0) + 1
        if problem is not None and tries == 1:
            self.say(f"{run.name} failed, and {self.host} could not be told: {problem}; it is tried again")
        if problem is not None and tries < MOST_TRIES:
            self._tries[run.id] = tries
            return False
        if problem is not None:
            self.say(f"{run.name} failed, and {self.host} was not told in {tries} tries: {problem}")
        return True

    def _post(self, text: str) -> str | None:
        """What went wrong, without the address."""
        body = json.dumps({"text": text}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=POST_SECONDS):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}"
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            # of another kind than the system's, it may quote the address
            return f"{type(reason).__name__}: {reason}" if isinstance(reason, OSError) else type(reason).__name__


def _in_words(client: SyncPrefectClient, run: FlowRun) -> str:
    state = run.state
    reason = _BEFORE_THE_REASON.sub("", (state.message if state is not None else None) or "no reason is known")
    return f"{deployment_named(client, run)}{run.name} {(run.state_name or 'failed').lower()}: {reason}"
