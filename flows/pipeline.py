"""A recipe becomes a Prefect flow of stage tasks: `run_pipeline(plan)`.

Reports to the API that the user has set up, to a `posttrain ui` that runs, or to a temporary server of its own, which
starts while this process imports Prefect. The flow and the task themselves are in `flows.prefect_flow`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any
from uuid import UUID

from artifacts.errors import PosttrainError, RequestError
from artifacts.sealed import scrub
from flows.holder import holder
from flows.listener import Listener
from flows.plan import Plan
from flows.run import Run
from flows.server import (
    QUIET,
    configured_url,
    loopback_without_proxy,
    prefect_home,
    require_answer,
    temporary_server,
)

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 20.0
"""Prefect's states of tasks reach its database a moment after the flow has ended, on a machine that is busy many."""


def run_pipeline(plan: Plan, listener: Listener | None = None, *, run_id: str | None = None) -> dict[str, Any]:
    """Run what the plan says and give the run's payload; its `state` is `failed` where a stage failed.

    Called inside a Prefect flow, the run is a subflow of it. Raises RequestError when the API that the user has
    set up does not answer, and StageError when a temporary one cannot be started; then nothing was run.
    """
    run = Run(plan, listener, run_id)
    run.listener.planned(plan.decisions)
    with prefect_at_hand() as settle:
        payload = run_flow(run)
        settle(run)
    return payload


@contextlib.contextmanager
def prefect_at_hand() -> Iterator[Callable[[Run], None]]:
    """Inside, flows report to the API of the flow that this is called in, to the user's, to that of a `posttrain ui`,
    or to a temporary server. Gives what waits until that server has all of a run.

    Raises as `run_pipeline` does.
    """
    if _inside_prefect():
        yield lambda run: None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_raises())
        home = prefect_home()
        if (url := configured_url()) is not None:
            require_answer(url)
            _before_import({})
            stack.enter_context(_reporting_to(url))
            yield lambda run: None
            return
        stack.enter_context(loopback_without_proxy())
        if (place := holder(home)) is not None:
            _before_import({"PREFECT_HOME": str(home)})
            stack.enter_context(_reporting_to(place.url))
            yield lambda run: None
            return
        server = stack.enter_context(temporary_server(home))
        _before_import({"PREFECT_HOME": str(home)})
        import flows.prefect_flow  # noqa: F401  (takes as long as the server's start, so do both at once)

        # heartbeats cost every run a second; this server ends with its flow and watches over none
        stack.enter_context(_reporting_to(server.wait(), PREFECT_FLOWS_HEARTBEAT_FREQUENCY=None))
        try:
            yield _settle
        finally:
            drain()


def run_flow(run: Run) -> dict[str, Any]:
    """The run as a Prefect flow, where Prefect is at hand; gives its payload."""
    from prefect.exceptions import CancelledRun

    from flows.prefect_flow import PipelineFailed, posttrain, using

    recipe = str(run.recipe.path or run.recipe.name)
    try:
        with using(run), said_of_prefect():
            _end_dead_runs()
            # shown in the pages; the flow takes the run itself
            posttrain(recipe, set=[scrub(text) for text in run.recipe.settings], store=run.store.url)
    except (PipelineFailed, CancelledRun):
        pass  # the payload says it
    finally:
        payload = run.finish()
    return payload


@contextlib.contextmanager
def said_of_prefect() -> Iterator[None]:
    """What Prefect's API does not do is a RequestError."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        import httpx

        if isinstance(error, httpx.HTTPError):
            raise RequestError(f"Prefect's API failed: {type(error).__name__}: {error}") from error
        raise


def _end_dead_runs() -> None:
    """Those of this machine that were killed, perhaps the one that this run goes on from."""
    from prefect.client.orchestration import get_client

    from flows.prefect_processes import end_dead_runs
    from flows.prefect_shown import only_shown

    with only_shown(), get_client(sync_client=True) as client:
        for line in end_dead_runs(client):
            logger.info("%s", line)


def _inside_prefect() -> bool:
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def _before_import(settings: Mapping[str, str]) -> None:
    """Settings that Prefect reads when it is imported, where it is not yet."""
    if "prefect" not in sys.modules:
        os.environ.update({**QUIET, **settings})


@contextlib.contextmanager
def _reporting_to(url: str, **settings: Any) -> Iterator[None]:
    import prefect.settings

    import flows.prefect_flow  # noqa: F401  (with it come the handlers of Prefect's log, which are to be quiet)

    given = {"PREFECT_API_URL": url, **settings}
    with (
        prefect.settings.temporary_settings({getattr(prefect.settings, name): value for name, value in given.items()}),
        _quiet(),
    ):
        yield


def _settle(run: Run) -> None:
    """Wait until the server has the last states, so that whoever looks into its database later finds them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    if run.flow_run_id is None:
        return
    drain()
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run.flow_run_id)]))
    expected = sum(entry["state"] != "skipped" for entry in run.entries.values())
    deadline = time.monotonic() + SETTLE_SECONDS
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            states = [found.state for found in client.read_task_runs(flow_run_filter=mine)]
            if len(states) >= expected and all(state is not None and state.is_final() for state in states):
                return
            time.sleep(0.05)
    logger.warning("Prefect's temporary server has not recorded every task's end; the store has")


def drain() -> None:
    """Send what Prefect still holds back; at exit, with the server gone, it would wait for it for minutes.

    For a server that goes, or a process: Prefect keeps what has been drained until the process ends, 2.6 MB each time.
    """
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=SETTLE_SECONDS)
    APILogWorker.drain_all(timeout=SETTLE_SECONDS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Prefect's lines off the terminal, which shows the run itself; its API gets them all the same."""

    def of_others(record: logging.LogRecord) -> bool:
        if record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
            return False
        theirs = record.name.startswith(("prefect", "EventsWorker", "APILogWorker"))
        return not theirs or record.levelno >= logging.ERROR

    handlers = [*logging.getLogger().handlers, *logging.getLogger("prefect").handlers]
    for handler in handlers:
        handler.addFilter(of_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(of_others)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, unless somebody else handles it already."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
