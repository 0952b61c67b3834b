"""Runs that fell due while their deployment's run before was in progress: Prefect cancels them, and here that is said.

Prefect's own words are "Cancelled" and what its limit is; whoever looks at the pages would not know why.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled

from flows.prefect_processes import FLOW
from flows.prefect_upkeep import ALIVE, deployment_named

LIMIT_REACHED = "Deployment concurrency limit reached."
"""Prefect's message for a run that its strategy CANCEL_NEW ends."""
SKIPPED = "Skipped"
"""The name of the state, which is of the type Cancelled."""
_LOOK_BACK = timedelta(days=1)
_FEW = 50


def name_skipped(client: SyncPrefectClient) -> Iterator[str]:
    """Gives each such run the state Skipped, and says which run it would have met."""
    ended = FlowRunFilterEndTime.model_validate({"after_": datetime.now(UTC) - _LOOK_BACK})
    for run in _cancelled(client, ["Cancelled"], FlowRunFilter(end_time=ended)):
        if run.deployment_id is None or not is_skipped(run):
            continue
        other = _in_progress(client, run)
        if other is not None and other.state_type == StateType.PENDING:
            continue  # it takes its name when it begins, and is looked for again then
        going = other.name if other is not None else "the run before it"
        message = f"{going} was still in progress"
        if not run.auto_scheduled:
            message += ", and a deployment has one run at a time; ask again when it has ended"
        state: State[object] = Cancelled(name=SKIPPED, message=message)
        client.set_flow_run_state(run.id, state, force=True)
        yield f"{deployment_named(client, run)}{run.name}, {due_in_words(run)}, was skipped: {message}"


def last_skipped(client: SyncPrefectClient, deployment: DeploymentFilter) -> FlowRun | None:
    """Of a deployment, whether or not it has been given the state."""
    runs = _cancelled(client, ["Cancelled", SKIPPED], FlowRunFilter(), deployment)
    return next((run for run in runs if is_skipped(run)), None)


def is_skipped(run: FlowRun) -> bool:
    """Whether it was ended because of the one before it."""
    return run.state is not None and (run.state.name == SKIPPED or run.state.message == LIMIT_REACHED)


def due_in_words(run: FlowRun) -> str:
    """`due at 2026-11-29 03:00:00 UTC`"""
    due = run.expected_start_time or run.created
    when = "" if due is None else f"{due.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"due at {when}" if run.auto_scheduled else f"asked for at {when}"


def _cancelled(
    client: SyncPrefectClient, names: list[str], wanted: FlowRunFilter, deployment: DeploymentFilter | None = None
) -> list[FlowRun]:
    wanted.state = FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.CANCELLED]), name=FlowRunFilterStateName(any_=names)
    )
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
        deployment_filter=deployment,
        flow_run_filter=wanted,
        sort=FlowRunSort.END_TIME_DESC,
        limit=_FEW,
    )


def _in_progress(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    assert run.deployment_id is not None
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ALIVE))),
        limit=1,
    )
    return found[0] if found else None
