"""The Prefect side of a run: one generic flow, one generic task, and what they show.

Prefect starts, shows and cancels; what is cached is decided by the store alone. The task returns the state
`Cached` with the reason on a hit, and raises on failure.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture, wait
from prefect.runtime import deployment as deployment_context
from prefect.runtime import flow_run as flow_run_context
from prefect.states import Cancelled, Completed, Crashed

from artifacts import open_store
from artifacts.errors import StageError, StoreError
from flows.entries import BROKEN
from flows.plan import plan_reading
from flows.prefect_log import keep_failures_short
from flows.prefect_processes import FLOW, say_process
from flows.prefect_report import Progress
from flows.prefect_results import publish_plan, publish_report, publish_results, publish_stage
from flows.prefect_slots import occupy, require_slots
from flows.prefect_told import ends_when_told
from flows.prefect_unrun import why_not_run
from flows.prefect_upkeep import end_task_runs
from flows.recipe import read_recipe
from flows.run import Run, new_run_id
from flows.stage_result import StageStopped
from flows.supervisors import STOP_SECONDS
from flows.told import told_once

current_run: contextvars.ContextVar[Run] = contextvars.ContextVar("posttrain_run")
"""The run that the flow and its tasks work on. Not a parameter: Prefect stores parameters in its database."""


Ended = TypeVar("Ended")
WAKE_SECONDS = 1.0
keep_failures_short()


class PipelineFailed(StageError):
    """Stages of the run failed; the message names each with its error."""


def _flow_run_name() -> str:
    run = current_run.get(None)
    if run is not None:
        return " ".join([run.recipe.name, *([run.trial.label] if run.trial else []), run.id.rsplit("-", 1)[-1]])
    named = _deployment() or Path(flow_run_context.parameters["recipe"]).stem
    return f"{named} {flow_run_context.id[-6:]}"


def _deployment() -> str | None:
    """The name of the deployment that the run is of, for one recipe may have several."""
    if flow_run_context.parent_flow_run_id is not None:
        return None  # the deployment is that of the user's flow
    name: str | None = None
    with contextlib.suppress(ObjectNotFound):  # removed meanwhile
        name = deployment_context.name
    return name


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(name: str) -> Any:
    """One stage of the current run; gives its outputs as `{output: id}`."""
    run = current_run.get()
    with Progress(name, get_run_logger()) as progress:
        try:
            outcome = run.execute(name, progress.event, occupy)
        except StageStopped as error:
            return Cancelled(message=str(error))
    publish_stage(run, name)
    references = {output: found.id for output, found in outcome.outputs.items()}
    if outcome.cached:
        return Completed(name="Cached", message=outcome.reason, data=references)
    return references


def _was_cancelled(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    _end_task_runs(flow_run.id, Cancelled(message="the run was cancelled"))


def _has_crashed(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    _end_task_runs(flow_run.id, Crashed(message="the run's process is gone"))


def _end_task_runs(flow_run: UUID, state: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        end_task_runs(client, flow_run, state)


@flow(
    name=FLOW,
    flow_run_name=_flow_run_name,
    persist_result=False,
    validate_parameters=False,
    # in the worker's process: that of the run is gone by then
    on_cancellation=[_was_cancelled],
    on_crashed=[_has_crashed],
)
def posttrain(  # noqa: PLR0913  (each is a field of the run form)
    recipe: str,
    parameters: dict[str, Any] | None = None,
    set: list[str] | None = None,
    only: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
    force: list[str] | None = None,
    store: str | None = None,
) -> dict[str, Any] | State[Any]:
    """Run a recipe (a path or a shipped one's name); gives the run's payload.

    `parameters` are the recipe's, `set` further `a.b=c` settings; `only`, `start` (`--from`), `until` and `force` name
    stages. Can be served, deployed, or called from a flow of your own. Raises PipelineFailed when a stage failed, and
    Prefect's CancelledRun or Pause when the run was cancelled or suspended in the pages.
    """
    run = current_run.get(None)
    if run is None:
        given = [f"{name}={json.dumps(value)}" for name, value in (parameters or {}).items()]
        made = plan_reading(
            read_recipe(recipe, [*given, *(set or [])]),
            open_store(store),
            only=only or (),
            start=start or (),
            until=until or (),
            force=force or (),
        )
        run = Run(made, run_id=f"{new_run_id().rsplit('-', 1)[0]}-{flow_run_context.id[-6:]}")
    run.flow_run_id = flow_run_context.id
    say_process(UUID(run.flow_run_id))
    require_slots(run)
    with using(run), told_once(), ends_when_told(run.flow_run_id, run.stop, run.is_done) as told:
        publish_plan(run)
        try:
            with run.supervisors:
                _run_stages(run)
        finally:
            payload = _finished(run)
            publish_results(run, payload)
        publish_report(run)  # a run that is cancelled has no time for it
    if told.end is not None:
        return told.end
    if failed := _failed(run):
        raise PipelineFailed("; ".join(failed))
    return payload


def _failed(run: Run) -> list[str]:
    return [f"{name}: {entry['error']}" for name, entry in run.entries.items() if entry["state"] in BROKEN]


def _finished(run: Run) -> dict[str, Any]:
    """The run's payload. Raises StoreError where the store does not take it, after what the stages failed of, which
    may be the same and is then known nowhere else."""
    try:
        return run.finish()
    except StoreError as error:
        raise StoreError("; ".join([*_failed(run), str(error)])) from error


def _run_stages(run: Run) -> None:
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        _schedule(run, futures)
    except BaseException:
        run.supervisors.stop()
        # each stage enters its own end; with its supervisor gone it cannot take long
        wait(list(futures.values()), timeout=STOP_SECONDS + 5)
        raise


def _schedule(run: Run, futures: dict[str, PrefectFuture[Any]]) -> None:
    """Start each stage as soon as all it reads from is there and a place is free."""
    waiting = run.pending()
    running: set[str] = set()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    while waiting or running:
        for name in list(waiting):
            cause = run.blocked(name)
            if cause is not None:
                run.skip(name, cause)
                waiting.remove(name)
            elif len(running) < run.recipe.parallel and _ready(run, name, running, waiting):
                needs = [futures[need] for need in run.recipe.stages[name].needs if need in futures]
                futures[name] = _submit(name, needs, ended)
                running.add(name)
                waiting.remove(name)
        if running:
            name = next_of(ended)
            running.remove(name)
            if name not in run.entries:
                run.fail(name, StageError(why_not_run(name, run.recipe.stages[name].needs, futures)))


def next_of(ended: queue.SimpleQueue[Ended]) -> Ended:
    """Waits in the main thread, where Ctrl-C, SIGTERM and cancellation are raised.

    It wakes now and then: a signal that the system hands to another thread wakes nobody here, and of a process that was
    just continued it does.
    """
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=WAKE_SECONDS)


def _ready(run: Run, name: str, running: set[str], waiting: list[str]) -> bool:
    return not any(need in running or need in waiting for need in run.recipe.stages[name].needs)


def _submit(name: str, needs: list[PrefectFuture[Any]], ended: queue.SimpleQueue[str]) -> PrefectFuture[Any]:
    future = run_stage.submit(name, wait_for=needs, return_state=False)
    future.add_done_callback(lambda _: ended.put(name))
    return future


@contextlib.contextmanager
def using(run: Run) -> Iterator[None]:
    """The block runs with `run` as the current one."""
    token = current_run.set(run)
    try:
        yield
    finally:
        current_run.reset(token)
