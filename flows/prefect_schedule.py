"""The deployments of recipes: which there are, when they run next, how they ran last; pause, resume, remove.

A row of one that was paused or removed also has `cancelled`, runs that were, and `going`, runs that go on.
"""

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
    FlowRunFilterStateName,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.server.schemas.schedules import SCHEDULE_TYPES
from pydantic import TypeAdapter

from artifacts.errors import Problem, RequestError
from flows.cancel import WAIT_SECONDS
from flows.prefect_cancel import UNFINISHED, ask, await_end
from flows.prefect_deploy import find, given
from flows.prefect_flow import posttrain
from flows.prefect_skipped import SKIPPED, due_in_words, last_skipped
from flows.prefect_upkeep import ALIVE
from stages.names import nearest

STARTED: list[StateType] = [kind for kind in StateType if kind not in (StateType.SCHEDULED, StateType.PENDING)]

BADLY = (StateType.FAILED, StateType.CRASHED)

Row = dict[str, Any]


def rows(client: SyncPrefectClient, names: Sequence[str] = ()) -> list[Row]:
    """One for each deployment named, or for all. Raises RequestError for an unknown name."""
    return [_row(client, deployment) for deployment in _named(client, names)]


def existing(client: SyncPrefectClient, names: Sequence[str]) -> dict[str, Row]:
    """Those of the deployments that there are."""
    found = {name: find(client, name) for name in names}
    return {name: _row(client, deployment) for name, deployment in found.items() if deployment is not None}


def pause(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """No run starts until they are resumed: those that had not begun are cancelled; runs that go on, go on."""
    found = _named(client, names)
    queued = {deployment.id: _queued(client, deployment) for deployment in found}
    for deployment in found:
        client.pause_deployment(deployment.id)  # Prefect deletes most of what it had planned
        asked: set[UUID] = set()
        # as many as Prefect gives at once; one that it keeps scheduled all the same is asked once
        while left := [run for run in _scheduled(client, deployment) if run.id not in asked]:
            for run in left:
                ask(client, run)
            asked |= {run.id for run in left}
            queued[deployment.id] |= {run.id: run.name for run in left if not _is_only_planned(run)}
    paused = rows(client, [deployment.name for deployment in found])
    for deployment, row in zip(found, paused, strict=True):
        going = _runs(client, deployment.id, ALIVE, FlowRunSort.START_TIME_DESC, None)
        row.update(cancelled=list(queued[deployment.id].values()), going=[run.name for run in going])
    return paused


def resume(client: SyncPrefectClient, names: Sequence[str]) -> list[Row]:
    """The schedules count again."""
    return _each(client, names, lambda found: client.resume_deployment(found.id))


def remove(
    client: SyncPrefectClient, names: Sequence[str], cancel: bool = False, wait_seconds: float = WAIT_SECONDS
) -> list[Row]:
    """Delete the deployments; runs, results and reports stay. Gives what they were.

    With `cancel`, their runs in progress are cancelled and waited for. Raises RequestError while one of them has a run
    in progress: Prefect takes no end of a run whose deployment is gone.
    """
    found = _named(client, names)
    before = [_row(client, deployment) for deployment in found]
    if not cancel:
        _require_rest(client, found)
    scheduled = [deployment for deployment in found if not deployment.paused]
    for deployment in scheduled:
        client.pause_deployment(deployment.id)  # nothing starts by itself between the last look and the end
    try:
        for deployment, row in zip(found, before, strict=True):
            row["cancelled"] = _end(client, deployment, wait_seconds) if cancel else []
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
}
"""Which give the rows as they are then; `remove` gives them as they were."""


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


def _queued(client: SyncPrefectClient, deployment: DeploymentResponse) -> dict[UUID, str]:
    """Id -> name of runs that were due before and have not begun."""
    now = datetime.now(UTC)
    due = [run for run in _scheduled(client, deployment) if (run.expected_start_time or now) <= now]
    return {run.id: run.name for run in due}


def _scheduled(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    return _runs(client, deployment.id, [StateType.SCHEDULED], FlowRunSort.EXPECTED_START_TIME_ASC, None)


def _in_progress(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[FlowRun]:
    """Those that began, and those that wait for one to end."""
    runs = _runs(client, deployment.id, UNFINISHED, FlowRunSort.START_TIME_DESC, None)
    return [run for run in runs if not _is_only_planned(run)]


def _end(client: SyncPrefectClient, deployment: DeploymentResponse, wait_seconds: float) -> list[str]:
    """Cancel its runs and wait for that; gives their names."""
    going = _in_progress(client, deployment)
    for run in going:
        ask(client, run)
    for run in going:
        await_end(client, run, wait_seconds)
    return [run.name for run in going]


def _require_rest(client: SyncPrefectClient, found: Sequence[DeploymentResponse]) -> None:
    """Raises RequestError that names every run in progress, and every one that waits for one to end."""
    pages = str(client.api_url).rstrip("/").removesuffix("/api")
    problems = []
    for deployment in found:
        problems += [
            Problem(
                f"schedule remove {deployment.name}",
                f"its run {run.name!r} has not ended ({run.state_name}): wait for "
                f"it, or cancel it at {pages}/runs/flow-run/{run.id}; `posttrain schedule remove {deployment.name} "
                f"--cancel` does both, `posttrain schedule pause {deployment.name}` keeps the next one from starting",
            )
            for run in _in_progress(client, deployment)
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
    last, skipped = _last(client, deployment.id), last_skipped(client, _of(deployment.id))
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
        "last": None if last is None else {"run": last.name, "state": last.state_name, "id": str(last.id)},
        "skipped": None if skipped is None else {"run": skipped.name, "when": due_in_words(skipped)},
    }


def _last(client: SyncPrefectClient, deployment: UUID) -> FlowRun | None:
    """The newest that began, or ended badly before it could; one that was skipped or cancelled before is none."""
    others = FlowRunFilterStateName(not_any_=[SKIPPED])
    runs = _runs(client, deployment, STARTED, FlowRunSort.START_TIME_DESC, None, others)
    return next((run for run in runs if run.run_count or run.state_type in BADLY), None)


def _runs(
    client: SyncPrefectClient,
    deployment: UUID,
    states: list[StateType],
    sort: FlowRunSort,
    limit: int | None = 1,
    names: FlowRunFilterStateName | None = None,
) -> list[FlowRun]:
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=states), name=names)
    wanted = FlowRunFilter(state=state)
    return client.read_flow_runs(deployment_filter=_of(deployment), flow_run_filter=wanted, sort=sort, limit=limit)


def _of(deployment: UUID) -> DeploymentFilter:
    return DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
