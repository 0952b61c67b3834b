"""The Prefect side of a run: one generic flow, one generic task, and what they show.

Prefect starts, shows and cancels; what is cached is decided by the store alone. The task returns the state
`Cached` with the reason on a hit, and raises on failure.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
from collections.abc import Iterator
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run as flow_run_context
from prefect.states import Completed

from artifacts import open_store
from artifacts.errors import StageError
from flows.launch import STOP_SECONDS
from flows.plan import plan
from flows.prefect_report import Progress, publish_plan, publish_results
from flows.recipe import Recipe
from flows.run import Run

current_run: contextvars.ContextVar[Run] = contextvars.ContextVar("posttrain_run")
"""The run that the flow and its tasks work on. Not a parameter: Prefect stores parameters in its database."""


class PipelineFailed(StageError):
    """Stages of the run failed; the message names each with its error."""


def _flow_run_name() -> str:
    run = current_run.get(None)
    if run is not None:
        return f"{run.recipe.name} {run.id.rsplit('-', 1)[-1]}"
    return str(flow_run_context.parameters["recipe"])


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(name: str) -> Any:
    """One stage of the current run; gives its outputs as `{output: id}`."""
    run = current_run.get()
    with Progress(name, get_run_logger()) as progress:
        outcome = run.execute(name, progress.event)
    references = {output: found.id for output, found in outcome.outputs.items()}
    if outcome.cached:
        return Completed(name="Cached", message=outcome.reason, data=references)
    return references


@flow(
    name="posttrain",
    flow_run_name=_flow_run_name,
    persist_result=False,
    validate_parameters=False,
)
def posttrain(recipe: str, settings: list[str] | None = None, store: str | None = None) -> dict[str, Any]:
    """Run a recipe (a path or a shipped one's name) with `a.b=c` settings; gives the run's payload.

    Can be served, deployed, or called from a flow of your own. Raises PipelineFailed when a stage failed.
    """
    run = current_run.get(None)
    if run is None:
        run = Run(plan(Recipe.load(recipe, settings or []), open_store(store)))
    run.flow_run_id = flow_run_context.id
    with using(run):
        publish_plan(run)
        try:
            with run.supervisors:
                _run_stages(run)
        finally:
            payload = run.finish()
            publish_results(run, payload)
    failed = {name: entry["error"] for name, entry in run.entries.items() if entry["state"] == "failed"}
    if failed:
        raise PipelineFailed("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return payload


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
            # a plain wait in the main thread: Ctrl-C, SIGTERM and cancellation are raised here
            name = ended.get()
            running.remove(name)
            if name not in run.entries:
                run.fail(name, StageError(f"Prefect did not run the task: {futures[name].state.message}"))


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
