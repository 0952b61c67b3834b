"""What a `posttrain ui` that was ended had in hand, when the next one starts: runs go on, looks of `deploy` do not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Scheduled

from flows.prefect_processes import CHECK_FLOW
from flows.prefect_upkeep import INTERRUPTED, missed_runs, runs_of


def go_on(client: SyncPrefectClient, pool: str) -> Iterator[str]:
    """Interrupted runs are due again, unless a run that fell due meanwhile does the same. Before the worker starts.
    Gives what was done, in words."""
    due = missed_runs(client, pool)
    for run in runs_of(client, pool, [StateType.CRASHED], INTERRUPTED):
        why_not = _why_not(client, run)
        if why_not is None and run.auto_scheduled and due.get(run.deployment_id):
            why_not = "a run that fell due meanwhile goes on from its last checkpoint"
        state: State[Any] = (
            Cancelled(message=f"posttrain ui was ended; {why_not}")
            if why_not is not None
            # of two that are due a deployment runs the earlier one
            else Scheduled(scheduled_time=run.expected_start_time or datetime.now(UTC))
        )
        client.set_flow_run_state(run.id, state, force=True)
        yield f"{run.name} was interrupted: {why_not or 'it goes on from its last checkpoint'}"


def drop_checks(client: SyncPrefectClient) -> None:
    """Deployments that a `posttrain deploy` made to have its recipe looked at, and was killed before they were gone."""
    for found in client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[CHECK_FLOW]))):
        client.delete_deployment(found.id)


def _why_not(client: SyncPrefectClient, run: FlowRun) -> str | None:
    assert run.deployment_id is not None
    try:
        paused = client.read_deployment(run.deployment_id).paused
    except ObjectNotFound:
        return "its deployment was removed since"
    return "its deployment is paused; ask for a run, which goes on from its last checkpoint" if paused else None
