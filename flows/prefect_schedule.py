"""The deployments of recipes: which there are, when they run next, how they ran last; pause, resume, remove."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
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
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from pydantic import TypeAdapter

from artifacts.errors import Problem, RequestError
from flows.prefect_deploy import find, given
from flows.prefect_flow import posttrain
from stages.names import nearest

STARTED: list[StateType] = [kind for kind in StateType if kind not in (StateType.SCHEDULED, StateType.PENDING)]

UNFINISHED = [kind for kind in StateType if kind not in TERMINAL_STATES]

Row = dict[str, Any]


def rows(client: SyncPrefectClient, names: Sequence[str] = ()) -> list[Row]:
    """One for each deployment named, or for all. Raises RequestError for an unknown name."""
    return [_row(client, deployment) for deployment in _named(client, names)]


def existing(client: SyncPrefectClient, names: Sequence[str]) -> dict[str, Row]:
    """Those of the deployments that there are."""
    found = {name: find(client, name) for name in names}
    return {name: _row(client, deployment) for name, deployment in found.items() if deployment is not None}


def pause(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """No run starts by itself until they are resumed; runs that go on, go on."""
    return _each(client, names, lambda found: client.pause_deployment(found.id))


def resume(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """The schedules count again."""
    return _each(client, names, lambda found: client.resume_deployment(found.id))


def remove(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """Delete the deployments; runs, results and reports stay. Gives what they were.

    Raises RequestError while one of them has a run in progress: Prefect takes no end of a run whose deployment is gone.
    """
    found = _named(client, names)
    before = [_row(client, deployment) for deployment in found]
    _require_rest(client, found)
    scheduled = [deployment for deployment in found if not deployment.paused]
    for deployment in scheduled:
        client.pause_deployment(deployment.id)  # nothing starts by itself between the last look and the end
    try:
        _require_rest(client, found)
    except RequestError:
        for deployment in scheduled:
            client.resume_deployment(deployment.id)
        raise
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


def _dates(deployment: DeploymentResponse) -> list[datetime]:
    """When each schedule is due next, for the moments until Prefect has made the run."""
    known: TypeAdapter[Any] = TypeAdapter(SCHEDULE_TYPES)
    active = [entry for entry in deployment.schedules if entry.active and not deployment.paused]
    dates: list[datetime] = []
    for entry in active:
        # the server's own class has the calendar, that of the client has not
        dates += asyncio.run(known.validate_python(entry.schedule.model_dump()).get_dates(1, datetime.now(UTC)))
    return [date.astimezone(UTC) for date in dates]


def _require_rest(client: SyncPrefectClient, found: Sequence[DeploymentResponse]) -> None:
    """Raises RequestError that names every run in progress, and every one that waits for one to end."""
    pages = str(client.api_url).rstrip("/").removesuffix("/api")
    problems = []
    for deployment in found:
        going = [
            run
            for run in _runs(client, deployment.id, UNFINISHED, FlowRunSort.START_TIME_DESC, None)
            if not _is_only_planned(run)
        ]
        problems += [
            Problem(
                f"schedule remove {deployment.name}",
                f"its run {run.name!r} has not ended ({run.state_name}): wait for "
                f"it, or cancel it at {pages}/runs/flow-run/{run.id}; `posttrain schedule pause {deployment.name}` "
                "keeps the next one from starting",
            )
            for run in going
        ]
    if problems:
        raise RequestError(problems)


def _is_only_planned(run: FlowRun) -> bool:
    """Made by the schedule and not begun: it goes with its deployment and nobody misses it."""
    return bool(run.auto_scheduled) and run.state_name in ("Scheduled", "Late")


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
    due = [run.expected_start_time for run in upcoming if run.expected_start_time is not None] or _dates(deployment)
    schedules = [describe(entry.schedule) for entry in deployment.schedules if entry.active]
    state = "paused" if deployment.paused else "scheduled" if schedules else "on request"
    return {
        "name": deployment.name,
        "recipe": deployment.parameters.get("recipe"),
        "given": given(deployment),
        "set": deployment.parameters.get("set") or [],
        "parameters": deployment.parameters.get("parameters") or {},
        "store": deployment.parameters.get("store"),
        "pool": deployment.work_pool_name,
        "schedule": schedules,
        "state": state,
        "next": min(due).isoformat(timespec="seconds") if due else None,
        "last": None if not last else {"run": last[0].name, "state": last[0].state_name, "id": str(last[0].id)},
    }


def _runs(
    client: SyncPrefectClient, deployment: UUID, states: list[StateType], sort: FlowRunSort, limit: int | None = 1
) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        sort=sort,
        limit=limit,
    )
