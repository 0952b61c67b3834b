"""The Prefect side of a sweep: a flow whose subflows are the trials' runs, each in a thread, so many at once."""

from __future__ import annotations

import contextvars
import queue
import threading
from typing import Any
from uuid import UUID

from prefect import flow, tags
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run as flow_run_context

from artifacts.errors import StageError
from flows.pipeline import run_flow, said_of_prefect
from flows.prefect_flow import next_of
from flows.prefect_processes import SWEEP_FLOW, say_process
from flows.prefect_results import publish_sweep_report
from flows.prefect_shown import show_table
from flows.prefect_slots import require_slots
from flows.prefect_told import ends_when_told
from flows.run import Run
from flows.standings_table import rows_of_text
from flows.supervisors import STOP_SECONDS
from flows.sweeping import Sweeping
from flows.told import told_once
from flows.trial import Trial

current_sweep: contextvars.ContextVar[Sweeping] = contextvars.ContextVar("posttrain_sweep")
"""What the flow works on. Not a parameter: Prefect stores parameters in its database."""


class SweepFailed(StageError):
    """Trials failed; the message names each with its error."""


def run_trials(going: Sweeping) -> None:
    """The whole sweep as a flow; it and the runs of its trials are tagged with its name."""
    token = current_sweep.set(going)
    try:
        with tags(going.sweep.name), said_of_prefect():
            sweep(going.sweep.name)
    except (SweepFailed, CancelledRun):
        pass  # the payload says it
    finally:
        current_sweep.reset(token)


@flow(name=SWEEP_FLOW, flow_run_name="sweep {name}", persist_result=False, validate_parameters=False)
def sweep(name: str) -> State[Any] | None:
    """The trials of the current sweep. Raises SweepFailed when one of them failed."""
    going = current_sweep.get()
    for trial in going.sweep.trials:
        require_slots(Run(trial.plan, trial=trial))
    flow_run = flow_run_context.id
    say_process(UUID(flow_run))
    with told_once(), ends_when_told(flow_run, going.stop, going.is_done) as told:
        _run_all(going)
    rows = going.standings().rows
    if (first := next((row.run for row in rows if row.run is not None), None)) is not None:
        publish_sweep_report(going.sweep.store, name, first)
    failed = [row for row in rows if row.state != "ok"]
    if told.end is not None:
        return told.end
    if failed:
        raise SweepFailed("; ".join(f"trial {row.trial}: {row.error or row.state}" for row in failed))
    return None


def _run_all(going: Sweeping) -> None:
    waiting = list(going.sweep.trials)
    running: dict[int, threading.Thread] = {}
    ended: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    try:
        while (waiting and not going.stopped) or running:
            while waiting and not going.stopped and len(running) < going.sweep.parallel:
                trial = waiting.pop(0)
                running[trial.number] = _start(going, trial, ended)
            trial = next_of(ended)
            running.pop(trial.number).join()
            standings = going.standings()
            going.listener.ended(trial, standings)
            show_table(rows_of_text(standings), "sweep", going.sweep.name, title=f"sweep {going.sweep.name}")
    except BaseException:
        going.stop()
        for thread in running.values():
            thread.join(STOP_SECONDS + 5)  # as long as a run gives its stages
        raise


def _start(going: Sweeping, trial: Trial, ended: queue.SimpleQueue[Trial]) -> threading.Thread:
    def work() -> None:
        error = None
        try:
            run_flow(going.begin(trial))
        except Exception as raised:
            error = raised
        try:
            going.end(trial, error)
        finally:
            ended.put(trial)

    context = contextvars.copy_context()  # the flow that its run is a subflow of, and the tags
    thread = threading.Thread(target=context.run, args=(work,), name=f"trial-{trial.number}", daemon=True)
    thread.start()
    return thread
