"""A run that no worker looks after ends when the pages say so.

Their Cancel notes in Prefect that a run is to end, and leaves the rest to its worker. Where there is none, the run
looks for itself, and ends alone: the sweep or the program that it is a part of goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled

from flows.prefect_shown import only_shown
from flows.run import Run

POLL_SECONDS = 2.0
MESSAGE = "cancelled in the pages; run again to go on"
_TOLD = (StateType.CANCELLING, StateType.CANCELLED)


@contextlib.contextmanager
def ends_when_told(run: Run) -> Iterator[None]:
    """Inside, Cancel in the pages stops the stages of the run; afterwards it is Cancelled there."""
    over, told = threading.Event(), threading.Event()
    watch = contextvars.copy_context().run  # Prefect's settings go with the context
    watcher = threading.Thread(target=watch, args=(_watch, run, over, told), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(POLL_SECONDS)  # a server that does not answer holds nobody up
        if told.is_set():
            with only_shown(), get_client(sync_client=True) as client:
                _close(client, run)


def _watch(run: Run, over: threading.Event, told: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not over.wait(POLL_SECONDS):
            if _is_told(client, run):
                told.set()
                run.stop()
                return


def _is_told(client: SyncPrefectClient, run: Run) -> bool:
    if run.flow_run_id is None:
        return False
    try:
        return client.read_flow_run(UUID(run.flow_run_id)).state_type in _TOLD
    except httpx.HTTPError:  # it is asked again; the run itself says what it misses
        return False


def _close(client: SyncPrefectClient, run: Run) -> None:
    """Unless all its stages were done when it was told."""
    assert run.flow_run_id is not None
    if client.read_flow_run(UUID(run.flow_run_id)).state_type != StateType.COMPLETED:
        client.set_flow_run_state(UUID(run.flow_run_id), Cancelled(message=MESSAGE), force=True)
