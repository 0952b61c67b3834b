"""Runs that have not ended, as Prefect knows them: found by name, told to end, and given their end."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from artifacts.errors import RequestError
from flows.cancel import Known
from flows.prefect_processes import FLOW, SWEEP_FLOW
from flows.prefect_upkeep import end_task_runs, let_end

UNFINISHED = [kind for kind in StateType if kind not in TERMINAL_STATES]
MESSAGE = "cancelled by `posttrain cancel`; run again to go on"
_SHORTEST_ID = 6
_POLL_SECONDS = 0.2


class PrefectPages:
    """What `flows.cancel` asks of Prefect."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client

    def known(self, flow_run: str) -> Known | None:
        """The run of that id; None: it is of another Prefect."""
        try:
            return _known(self._client.read_flow_run(UUID(flow_run)))
        except (ObjectNotFound, ValueError):
            return None

    def named(self, reference: str) -> Known | None:
        """Raises RequestError where several are meant."""
        runs = self._unfinished()
        found = [run for run in runs if run.name == reference]
        if not found and len(reference) >= _SHORTEST_ID:
            found = [run for run in runs if str(run.id).startswith(reference) or run.name.endswith(f" {reference}")]
        if len(found) > 1:
            raise RequestError(
                f"{reference!r} may be {len(found)} runs in Prefect: {', '.join(str(r.id) for r in found)}"
            )
        return _known(found[0]) if found else None

    def names(self) -> list[str]:
        """Of runs that have not ended."""
        return [run.name for run in self._unfinished()]

    def ask(self, run: Known) -> None:
        """What has not begun is cancelled at once."""
        ask(self._client, self._client.read_flow_run(UUID(run.id)))

    def has_ended(self, run: Known) -> bool:
        """Whether it is in a final state."""
        return is_final(self._client.read_flow_run(UUID(run.id)))

    def close(self, run: Known) -> None:
        """Cancelled, unless it had ended by itself. A process that is told to end says that it crashed."""
        found = self._client.read_flow_run(UUID(run.id))
        if not is_final(found) or found.state_type == StateType.CRASHED:
            cancelled: State[object] = Cancelled(message=MESSAGE)
            end_task_runs(self._client, found.id, cancelled)
            self._client.set_flow_run_state(found.id, cancelled, force=True)

    def _unfinished(self) -> list[FlowRun]:
        return self._client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW, SWEEP_FLOW])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNFINISHED))),
        )


def ask(client: SyncPrefectClient, run: FlowRun) -> None:
    """As Cancel in the pages does."""
    let_end(client, run)
    client.set_flow_run_state(run.id, Cancelling(message="posttrain cancel"))


def await_end(client: SyncPrefectClient, run: FlowRun, seconds: float) -> None:
    """Raises RequestError for one that its worker has not ended by then."""
    deadline = time.monotonic() + seconds
    while not is_final(found := client.read_flow_run(run.id)):
        if time.monotonic() > deadline:
            raise RequestError(
                f"the run {run.name!r} was told to end {seconds:.0f} s ago and has not ({found.state_name}); does "
                "`posttrain ui`, or its worker, run?"
            )
        time.sleep(_POLL_SECONDS)


def is_final(run: FlowRun) -> bool:
    """Whether it has ended."""
    return run.state is not None and run.state.is_final()


def _known(run: FlowRun) -> Known:
    return Known(
        id=str(run.id),
        name=run.name,
        begun=run.state_type != StateType.SCHEDULED,
        worker=run.deployment_id is not None,
        process=run.infrastructure_pid,
    )
