"""Which process a flow run without a worker has, and an end for runs whose process is known to be gone.

Prefect knows of a run that was killed by its silence alone, and waits long for that. Whoever is on the same machine can
look; of runs of other machines, and of those that a worker looks after, nothing is said here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Crashed

from artifacts.owner import is_dead, owner_tag
from flows.prefect_shown import only_shown
from flows.prefect_upkeep import ALIVE, end_task_runs

FLOW = "posttrain"
SWEEP_FLOW = "posttrain sweep"
CHECK_FLOW = "posttrain check"
_OF_A_WORKER = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a process that a worker started for one run."""


def has_a_worker() -> bool:
    """Whether the run of this process is a worker's, which follows its process."""
    return _OF_A_WORKER in os.environ


def say_process(flow_run: UUID) -> None:
    """Notes in the server that this process runs it, where no worker does."""
    if not has_a_worker():
        with only_shown(), get_client(sync_client=True) as client:
            client.update_flow_run(flow_run, infrastructure_pid=owner_tag())


def end_dead_runs(client: SyncPrefectClient) -> Iterator[str]:
    """Runs of this machine whose process is gone have crashed, or were cancelled where they had been told to end.
    Gives what was done, in words."""
    for run in _alive(client):
        if run.deployment_id is None and is_dead(str(run.infrastructure_pid)):
            # it may have said how it ended after the server was asked: nobody but its process does
            run = client.read_flow_run(run.id)
            if run.state_type in ALIVE:
                yield _end(client, run)


def _alive(client: SyncPrefectClient) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW, SWEEP_FLOW])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ALIVE))),
        sort=FlowRunSort.START_TIME_DESC,
    )


def _end(client: SyncPrefectClient, run: FlowRun) -> str:
    cancelled = run.state_type == StateType.CANCELLING
    gone = f"its process ({str(run.infrastructure_pid).split('-')[1]}) is gone and had not said how it ended"
    message = f"{gone}; run again to go on"
    state: State[Any] = Cancelled(message=message) if cancelled else Crashed(message=message)
    end_task_runs(client, run.id, state)
    client.set_flow_run_state(run.id, state, force=True)
    return f"{run.name} {'was cancelled' if cancelled else 'crashed'}: {message}"
