"""What a lasting server needs besides running: its pool and limits, and an end for what has none.

Prefect ends a run as Crashed when its worker sees its process die. Where the worker dies with it, or a run has none
(`posttrain run`), its heartbeats stop and an automation says so; what the last `posttrain ui` left behind is put
right when the next one starts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed, Running, Scheduled

from artifacts.errors import RequestError

AUTOMATION = "posttrain: runs whose heartbeats stopped have crashed"
SILENCE = timedelta(seconds=540)
"""Three heartbeats of a run that beats as Prefect does by itself, every 180 s: one that `posttrain run` or a program of
the user's started. Those of the worker beat every minute."""
ALIVE = [StateType.RUNNING, StateType.CANCELLING, StateType.PENDING]
UNTAKEN = "its deployment was deleted while it ran, and Prefect took no end of it; what it did is in the store"
INTERRUPTED = "Interrupted"
"""The name of the state of runs that ended with `posttrain ui`, which is of the type Crashed."""
CANCEL_SECONDS = 40
"""A cancelled run ends in ten seconds; Prefect kills one that does not after thirty."""


def prepare(client: SyncPrefectClient, pool: str, slots: Mapping[str, int]) -> list[str]:
    """Before the worker starts. Gives what had to be put right, in words."""
    _make_pool(client, pool)
    for name, limit in slots.items():
        client.upsert_global_concurrency_limit_by_name(name, limit)
    _watch_over_runs(client)
    return [*_end_lost_runs(client, pool), *_drop_missed_runs(client, pool)]


def stop_runs(client: SyncPrefectClient, pool: str, still_working: Callable[[], bool]) -> list[str]:
    """Cancel what runs in the pool and wait for its end; what nobody else had cancelled is Interrupted then, and goes
    on with the next `posttrain ui`. Gives how each run ended, in words."""
    stopped = runs_of(client, pool, ALIVE)
    for run in stopped:
        if let_end(client, run) and not _is_alive(run):
            _crash(client, run, UNTAKEN)
        else:
            client.set_flow_run_state(run.id, Cancelling(message="posttrain ui was ended; run again to go on"))
    deadline = time.monotonic() + CANCEL_SECONDS
    while runs_of(client, pool, ALIVE) and time.monotonic() < deadline and still_working():
        time.sleep(0.2)
    for run in stopped:
        if run.state_type != StateType.CANCELLING:
            _interrupt(client, client.read_flow_run(run.id))
    return [_how_it_ended(client.read_flow_run(run.id)) for run in stopped]


def _interrupt(client: SyncPrefectClient, run: FlowRun) -> None:
    """One that was cancelled because the worker goes. It counts as crashed: somebody may wait for it."""
    if run.state_type == StateType.CANCELLED and run.deployment_id is not None and _is_there(client, run.deployment_id):
        message = "posttrain ui was ended; it goes on from its last checkpoint when that starts again"
        interrupted: State[Any] = Crashed(name=INTERRUPTED, message=message)
        client.set_flow_run_state(run.id, interrupted, force=True)


def _how_it_ended(run: FlowRun) -> str:
    if run.state_name == INTERRUPTED and run.state is not None:
        return f"{run.name} was interrupted: {run.state.message}"
    if run.state_type == StateType.CANCELLED:
        return f"{run.name} was cancelled; its next run goes on from its last checkpoint"
    if run.state_type == StateType.CRASHED and run.state is not None:
        return f"{run.name} crashed: {run.state.message}"
    if run.state is not None and run.state.is_final():
        return f"{run.name} had ended before it could be cancelled: {run.state_name}"
    return f"{run.name} did not end when it was cancelled ({run.state_name}); the next `posttrain ui` puts that right"


def end_task_runs(client: SyncPrefectClient, flow_run: UUID, state: State[Any]) -> None:
    """Give a state to task runs whose process was killed before they could report one."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    for task_run in client.read_task_runs(flow_run_filter=mine):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, state, force=True)


def deployment_named(client: SyncPrefectClient, run: FlowRun) -> str:
    """`tiny: `, the name of its deployment before what is said of the run, which has it in its own name once it began;
    nothing if it was removed since."""
    assert run.deployment_id is not None
    try:
        name = client.read_deployment(run.deployment_id).name
    except ObjectNotFound:
        return ""
    return "" if run.name.startswith(f"{name} ") else f"{name}: "


def _make_pool(client: SyncPrefectClient, pool: str) -> None:
    known = {found.name: found.type for found in client.read_work_pools()}
    if pool not in known:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    elif known[pool] != "process":
        raise RequestError(
            f"the work pool {pool!r} is of type {known[pool]!r}; `posttrain ui` works for pools of type process: give "
            "another --pool"
        )


def _watch_over_runs(client: SyncPrefectClient) -> None:
    """One automation, as it is made now: that of an earlier version is replaced."""
    known = client.read_automations_by_name(AUTOMATION)
    if any(isinstance(found.trigger, EventTrigger) and found.trigger.within == SILENCE for found in known):
        return
    for found in known:
        client.delete_automation(found.id)
    client.create_automation(crashed_when_silent())


def crashed_when_silent(name: str = AUTOMATION, runs: str = "*", silence: timedelta = SILENCE) -> AutomationCore:
    """A run whose heartbeats stop for so long, without an end, has crashed."""
    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    heartbeat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        after={heartbeat},
        expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
        match={"prefect.resource.id": [f"prefect.flow-run.{runs}"]},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )
    message = f"no heartbeat for {silence.total_seconds():.0f} s: its process or machine is gone; run again to go on"
    crash = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=message, force=False)
    return AutomationCore(name=name, trigger=trigger, actions=[crash])


def _end_lost_runs(client: SyncPrefectClient, pool: str) -> Iterable[str]:
    """Runs of a worker that is no more: those that had begun have crashed, the others are due again."""
    for run in runs_of(client, pool, ALIVE):
        if _is_alive(run):
            continue
        orphaned = let_end(client, run)
        if run.state_type == StateType.PENDING and not orphaned:
            client.set_flow_run_state(run.id, Scheduled(), force=True)
            yield f"{run.name} had not begun when the last worker ended; it starts now"
            continue
        if orphaned:
            _crash(client, run, UNTAKEN)
            yield f"{run.name} crashed: {UNTAKEN}"
            continue
        _crash(client, run, "its process ended with the last `posttrain ui`; run again to go on")
        yield f"{run.name} crashed with the last `posttrain ui`; its next run goes on from its last checkpoint"


def _crash(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    crashed: State[Any] = Crashed(message=message)
    end_task_runs(client, run.id, crashed)
    client.set_flow_run_state(run.id, crashed, force=True)


def let_end(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether the run's deployment is gone; if so the run can end now.

    A run in progress holds a slot of its deployment's limit, which goes with the deployment: Prefect fails to give the
    slot back and refuses every end of the run (HTTP 500), forced ones too. A state that is forced forgets the slot.
    """
    if run.deployment_id is None or _is_there(client, run.deployment_id):
        return False
    client.set_flow_run_state(run.id, Running(), force=True)
    return True


def _is_there(client: SyncPrefectClient, deployment: UUID) -> bool:
    try:
        client.read_deployment(deployment)
    except ObjectNotFound:
        return False
    return True


def _is_alive(run: FlowRun) -> bool:
    try:
        process = psutil.Process(int(str(run.infrastructure_pid).rpartition(":")[2]))
        return process.environ().get("PREFECT__FLOW_RUN_ID") == str(run.id)
    except (ValueError, psutil.Error):
        return False


def _drop_missed_runs(client: SyncPrefectClient, pool: str) -> Iterable[str]:
    """Of the runs that a deployment missed while nothing ran, the last is made up for."""
    for runs in missed_runs(client, pool).values():
        for run in sorted(runs, key=lambda run: run.expected_start_time or datetime.now(UTC))[:-1]:
            client.set_flow_run_state(run.id, Cancelled(message="missed; a later run makes up for it"), force=True)
            yield f"{run.name}, due at {run.expected_start_time}, was missed; a later run makes up for it"


def missed_runs(client: SyncPrefectClient, pool: str) -> dict[UUID | None, list[FlowRun]]:
    """Deployment -> its runs that a schedule made, that were due and have not begun."""
    missed: dict[UUID | None, list[FlowRun]] = defaultdict(list)
    for run in runs_of(client, pool, [StateType.SCHEDULED]):
        if run.auto_scheduled and run.expected_start_time is not None and run.expected_start_time < datetime.now(UTC):
            missed[run.deployment_id].append(run)
    return missed


def runs_of(client: SyncPrefectClient, pool: str, states: list[StateType], name: str | None = None) -> list[FlowRun]:
    """Those of a pool in states of these types, and where it is given of this name."""
    named = None if name is None else FlowRunFilterStateName(any_=[name])
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=states), name=named)
    return client.read_flow_runs(
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        flow_run_filter=FlowRunFilter(state=state),
    )
