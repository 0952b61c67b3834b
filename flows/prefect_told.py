"""Flow runs end when the pages say so: by Cancel where no worker looks after the run, by Suspend where one does.

Cancel notes in Prefect that a run is to end, and leaves the rest to its worker. Where there is none, the run looks for
itself, and ends alone: the sweep or the program that it is a part of goes on. Suspend no worker minds, and Prefect
itself only keeps tasks from beginning: a training would go on, with another one beside it after Resume, and Cancel
would end one of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound, Pause
from prefect.states import Cancelled, Completed

from flows.prefect_processes import has_a_worker
from flows.prefect_shown import only_shown
from flows.prefect_upkeep import end_task_runs

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
MESSAGE = "cancelled in the pages; run again to go on"
SUSPENDED = "suspended in the pages: stages end; Resume there goes on from their last checkpoints"
_TOLD = (StateType.CANCELLING, StateType.CANCELLED)


class Told:
    """What the pages said of a flow run."""

    def __init__(self) -> None:
        self.worker = has_a_worker()
        self.heard = False
        self.end: State[Any] | None = None
        """What the flow is to give back then, where it was cut short."""

    @property
    def ends(self) -> tuple[StateType, ...]:
        """The states that a run has to end in by itself."""
        return (StateType.PAUSED,) if self.worker else _TOLD


@contextlib.contextmanager
def ends_when_told(flow_run: str, stop: Callable[[], None], all_done: Callable[[], bool]) -> Iterator[Told]:
    """Inside a flow: Cancel or Suspend in the pages calls `stop`, in another thread, and the block is to end then.

    Afterwards `end` is Cancelled, or where nothing was left to cancel the run is Completed: of one that was told to end
    Prefect takes no other end. What a signal ends, its sender gives an end. Raises Prefect's Pause where the run was
    suspended: its process ends, and Resume starts another one.
    """
    told = Told()
    over = threading.Event()
    in_context = contextvars.copy_context().run  # Prefect's settings go with the context
    watcher = threading.Thread(target=in_context, args=(_watch, UUID(flow_run), stop, told, over), daemon=True)
    watcher.start()
    try:
        yield told
    finally:
        over.set()
        watcher.join(POLL_SECONDS)  # a server that does not answer holds nobody up
        why = sys.exception()
        if why is None or isinstance(why, Exception):
            with only_shown(), get_client(sync_client=True) as client:
                _close(client, UUID(flow_run), told, all_done())


def _watch(flow_run: UUID, stop: Callable[[], None], told: Told, over: threading.Event) -> None:
    log = get_run_logger()  # of the context
    with get_client(sync_client=True) as client:
        while not over.wait(POLL_SECONDS):
            try:
                told.heard = client.read_flow_run(flow_run).state_type in told.ends
            except ObjectNotFound:  # somebody deleted it
                return
            except Exception as error:  # it is asked again; the run itself says what it misses
                logger.debug("whether %s is to end was not answered: %s", flow_run, error)
            if told.heard:
                if told.worker:
                    log.warning(SUSPENDED)
                stop()
                return


def _close(client: SyncPrefectClient, flow_run: UUID, told: Told, all_done: bool) -> None:
    """It may have been told after the last look, and resumed since."""
    if not told.heard and client.read_flow_run(flow_run).state_type not in told.ends:
        return
    if all_done:
        client.set_flow_run_state(flow_run, Completed(), force=True)
    elif told.worker:
        raise Pause
    else:
        told.end = Cancelled(message=MESSAGE)
        end_task_runs(client, flow_run, Cancelled(message=MESSAGE))
