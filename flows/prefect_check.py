"""`posttrain deploy` has the worker look whether a run could begin: a flow that plans, and runs no stage.

The worker has an environment, a user and perhaps a machine of its own; what it finds is what a run at night will find.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.runtime import deployment as deployment_context
from prefect.states import Completed

from artifacts.errors import PosttrainError, Problem, RequestError
from flows.deploy_check import check
from flows.holder import holder
from flows.prefect_deploy import Deployable
from flows.prefect_processes import CHECK_FLOW
from flows.server import prefect_home

ENTRYPOINT = "flows.prefect_check.look"
REFUSED = "Refused"
"""The name of the state of a check that found something; it is of the type Completed, and nobody is alerted."""
BEGIN_SECONDS = 120.0
"""A worker asks every few seconds, and a process of Prefect's takes seconds to start."""
END_SECONDS = 900.0
_POLL_SECONDS = 0.2


class _NobodyLooks(RequestError):
    """No worker begins or ends what it was asked."""


def _flow_run_name() -> str:
    return f"check {deployment_context.name}"


@flow(name=CHECK_FLOW, flow_run_name=_flow_run_name, persist_result=False)
def look(recipe: str, settings: list[str], store: str) -> State[None]:
    """Whether a run could begin: Completed, or Refused with a line for each problem."""
    try:
        made = check(recipe, settings, store)
    except RequestError as error:
        lines = (" ".join(str(problem).split()) for problem in error.problems)
        return Completed(name=REFUSED, message="\n".join(lines))
    except PosttrainError as error:
        return Completed(name=REFUSED, message=f"{recipe}: {error}")
    states = [decision.state_in_words for decision in made.decisions.values()]
    return Completed(message=", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def all_checked(
    client: SyncPrefectClient, read: Mapping[str, Deployable], pool: str, store: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Deployment -> who looked and found nothing. Raises RequestError with what is known to end a run of any."""
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, what in read.items():
        say(f"looking whether a run of {name} could begin (--unchecked leaves that out)")
        try:
            by, stages = _checked(client, what, name, pool=pool, store=store)
            found[name] = {"by": by, "stages": stages}
        except _NobodyLooks:  # nor would anybody at the others
            raise
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return found


def _checked(
    client: SyncPrefectClient, what: Deployable, name: str, *, pool: str, store: str
) -> tuple[str, str | None]:
    """By whom (a worker, or this process where none is there), and what a worker said of the stages.

    Raises RequestError with everything that is known to end a run of the deployment."""
    settings = what.overrides
    if not _has_worker(client, pool):
        check(what.source, settings, store)
        return f"from here, for no worker of pool {pool} is there", None
    made = client.create_deployment(
        flow_id=client.create_flow(look),
        name=f"{name} {os.urandom(3).hex()}",
        work_pool_name=pool,
        entrypoint=ENTRYPOINT,
        tags=["posttrain"],
    )
    try:
        asked = client.create_flow_run_from_deployment(
            made, parameters={"recipe": what.source, "settings": list(settings), "store": store}
        )
        run = _ended(client, asked)
    finally:
        client.delete_deployment(made)
    state = run.state
    assert state is not None
    if state.name == REFUSED:
        raise RequestError([_problem(line) for line in (state.message or "").splitlines()])
    if not state.is_completed():
        said = state.message or "no reason is known"
        raise RequestError(
            f"the worker of pool {pool} could not look whether a run would begin: {run.name} {state.name}: {said}; its "
            "log is in the pages. A run would end there as well"
        )
    return f"by the worker of pool {pool}", state.message


def _has_worker(client: SyncPrefectClient, pool: str) -> bool:
    """That of a `posttrain ui` is on its way where it is not there yet."""
    place = holder(prefect_home())
    if place is not None and (place.url, place.pool) == (str(client.api_url).rstrip("/"), pool):
        return True
    return any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))


def _ended(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Raises RequestError for one that no worker begins or ends."""
    begun_by, ended_by = time.monotonic() + BEGIN_SECONDS, time.monotonic() + END_SECONDS
    while True:
        found = client.read_flow_run(run.id)
        if found.state is not None and found.state.is_final():
            return found
        waits = found.state is None or found.state.is_scheduled()
        if time.monotonic() > (begun_by if waits else ended_by):
            what = "has not begun" if waits else "has not ended"
            raise _NobodyLooks(
                f"a worker was asked to look whether a run would begin, which {what} after "
                f"{BEGIN_SECONDS if waits else END_SECONDS:.0f} s: is it there, and has its pool room for a run? "
                "--unchecked deploys without"
            )
        time.sleep(_POLL_SECONDS)


def _problem(line: str) -> Problem:
    where, _, what = line.partition(": ")
    return Problem(where, what)
