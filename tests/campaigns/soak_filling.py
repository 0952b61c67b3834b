"""What Prefect's server keeps up to a number or for some time is filled before a soak is judged.

It remembers the ids of the events of half an hour, at most 10,000: runs need an hour and more to send so many, of which
a soak would see but the filling. Sent at once they take minutes, and from then on one goes for each that comes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx

EVENTS = 10_000
"""`CausalOrdering` of prefect.server.events.ordering.memory."""
LARGEST_BATCH = 40
"""They are written to the database by the batch, whose sizes differ as those of runs do: from one event on."""
UNWRITTEN = 1000
"""Sent ahead at most: the server drops those above 10,000."""
LIMIT_SECONDS = 900
TYPICAL_STATES = ("Pending", "Running", "Completed")


def fill(url: str) -> int:
    """Send the API so many events, until all are in its database; gives how many. Raises TimeoutError where it does not
    take them."""
    flow_run = uuid.uuid4()
    deadline = time.monotonic() + LIMIT_SECONDS
    with httpx.Client(base_url=url, timeout=60) as client:
        before, sent = _written(client), 0
        for batch in _batches():
            client.post("/events", json=[_event(flow_run, number) for number in range(batch)]).raise_for_status()
            sent += batch
            while sent - (_written(client) - before) > (UNWRITTEN if sent < EVENTS else 0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"of {sent} events {_written(client) - before} are in the server's database")
                time.sleep(0.1)
    return sent


def _batches() -> Iterator[int]:
    """Sizes of batches, EVENTS together."""
    left, size = EVENTS, 0
    while left:
        size = min(left, size % LARGEST_BATCH + 1)
        yield size
        left -= size


def _written(client: httpx.Client) -> int:
    """Events in the database."""
    return int(client.post("/events/filter", json={"limit": 0}).raise_for_status().json()["total"])


def _event(flow_run: uuid.UUID, number: int) -> dict[str, Any]:
    """As a task sends it for each of its states."""
    state, task_run = TYPICAL_STATES[number % len(TYPICAL_STATES)], uuid.uuid4()
    return {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": f"prefect.task-run.{state}",
        "resource": {
            "prefect.resource.id": f"prefect.task-run.{task_run}",
            "prefect.resource.name": "filling",
            "prefect.state-name": state,
        },
        "related": [{"prefect.resource.id": f"prefect.flow-run.{flow_run}", "prefect.resource.role": "flow-run"}],
        "payload": {"task_run": {"task_key": "filling", "dynamic_key": str(number)}},
    }
