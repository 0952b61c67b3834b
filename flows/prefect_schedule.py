"""The deployments of recipes: which there are, when they run next, how they ran last; pause, resume, remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort

from artifacts.errors import RequestError
from flows.prefect_flow import posttrain
from stages.names import nearest

STARTED: list[StateType] = [kind for kind in StateType if kind not in (StateType.SCHEDULED, StateType.PENDING)]

Row = dict[str, Any]


def rows(client: SyncPrefectClient, names: Sequence[str] = ()) -> list[Row]:
    """One for each deployment named, or for all. Raises RequestError for an unknown name."""
    return [_row(client, deployment) for deployment in _named(client, names)]


def pause(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """No run starts by itself until they are resumed; runs that go on, go on."""
    return _each(client, names, lambda found: client.pause_deployment(found.id))


def resume(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """The schedules count again."""
    return _each(client, names, lambda found: client.resume_deployment(found.id))


def remove(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """Delete the deployments; runs, results and reports stay. Gives what they were."""
    found = _named(client, names)
    before = [_row(client, deployment) for deployment in found]
    for deployment in found:
        client.delete_deployment(deployment.id)
    return before


ACTIONS: dict[str, Callable[[SyncPrefectClient, Sequence[str]], list[Row]]] = {
    "list": rows,
    "pause": pause,
    "resume": resume,
    "remove": remove,
}


def describe(schedule: Any) -> str:
    """`cron 0 3 * * * (UTC)`, `every 1:00:00`"""
    if isinstance(schedule, CronSchedule):
        return f"cron {schedule.cron} ({schedule.timezone or 'UTC'})"
    return f"every {schedule.interval}" if isinstance(schedule, IntervalSchedule) else str(schedule)


def _each(client: SyncPrefectClient, names: Sequence[str], act: Callable[[DeploymentResponse], None]) -> list[Row]:
    for found in _named(client, names):
        act(found)
    return rows(client, names)


def _named(client: SyncPrefectClient, names: Sequence[str]) -> list[DeploymentResponse]:
    mine = FlowFilter(name=FlowFilterName(any_=[posttrain.name]))
    found = {deployment.name: deployment for deployment in client.read_deployments(flow_filter=mine)}
    unknown = [name for name in names if name not in found]
    if unknown:
        there = ", ".join(sorted(found)) or "none"
        hints = "; ".join(f"there is no deployment {name!r}{nearest(name, found)}" for name in unknown)
        raise RequestError(f"{hints}; there are: {there}")
    return [found[name] for name in names or sorted(found)]


def _row(client: SyncPrefectClient, deployment: DeploymentResponse) -> Row:
    upcoming = _runs(client, deployment.id, [StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC)
    last = _runs(client, deployment.id, STARTED, FlowRunSort.START_TIME_DESC)
    schedules = [describe(entry.schedule) for entry in deployment.schedules if entry.active]
    state = "paused" if deployment.paused else "scheduled" if schedules else "on request"
    return {
        "name": deployment.name,
        "recipe": deployment.parameters.get("recipe"),
        "set": deployment.parameters.get("set") or [],
        "parameters": deployment.parameters.get("parameters") or {},
        "pool": deployment.work_pool_name,
        "schedule": schedules,
        "state": state,
        "next": upcoming[0].expected_start_time.isoformat(timespec="seconds") if upcoming else None,
        "last": None if not last else {"run": last[0].name, "state": last[0].state_name, "id": str(last[0].id)},
    }


def _runs(client: SyncPrefectClient, deployment: UUID, states: list[StateType], sort: FlowRunSort) -> list[Any]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        sort=sort,
        limit=1,
    )
