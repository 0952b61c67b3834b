"""Slots of Prefect's global concurrency limits, which a stage occupies while its process runs (`launch.slots`).

Taken after the store has said that there is work to do: a cached stage waits for no GPU. Each slot is held by a lease
that is renewed; where the holder is killed it expires.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from artifacts.errors import Problem, RequestError
from flows.run import Run
from flows.sharing import beside
from flows.stage_result import StageStopped
from stages.names import nearest

logger = logging.getLogger(__name__)

LEASE_SECONDS = 90.0
"""The shortest that Prefect takes is 60."""
ASK_SECONDS = 1.0


def require_slots(run: Run) -> None:
    """Raises RequestError where a stage names a limit that there is not, or that is too small for it."""
    wanted = {
        (name, limit): count
        for name, decision in run.plan.decisions.items()
        if decision.state not in ("cached", "skipped")
        for limit, count in run.recipe.stages[name].launch.slots.items()
    }
    if not wanted:
        return
    with get_client(sync_client=True) as client:
        sizes = {found.name: found.limit for found in client.read_global_concurrency_limits(limit=200)}
    problems = []
    for (name, limit), count in wanted.items():
        where = run.recipe.where("stages", name, "launch", "slots", limit)
        if limit not in sizes:
            what = (
                f"there is no limit {limit!r}{nearest(limit, sizes)}; make it with `posttrain ui --slots {limit}=N` or "
                f"`prefect gcl create {limit} --limit N`"
            )
            problems.append(Problem(where, what))
        elif sizes[limit] < count:
            problems.append(Problem(where, f"asks for {count} slots, and {limit!r} has {sizes[limit]}"))
    if problems:
        raise RequestError(problems)


@contextlib.contextmanager
def occupy(slots: Mapping[str, int], stopping: threading.Event, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds `slots` while the block runs, waiting for them. Raises StageStopped where the run ends meanwhile."""
    with contextlib.ExitStack() as stack:
        if slots:
            client = stack.enter_context(get_client(sync_client=True))
            # in one order: two stages that want the same limits cannot each hold what the other waits for
            for name, count in sorted(slots.items()):
                stack.enter_context(_held(client, name, count, stopping, tell))
        yield


@contextlib.contextmanager
def _held(
    client: SyncPrefectClient, name: str, count: int, stopping: threading.Event, tell: Callable[[str], None]
) -> Iterator[None]:
    lease = _acquire(client, name, count, stopping, tell)
    try:
        with beside(partial(_renew, name, lease)):
            yield
    finally:
        try:
            client.release_concurrency_slots_with_lease(lease)
        except (httpx.HTTPError, ObjectNotFound) as error:  # it expires by itself
            logger.warning("slots of %r were not given back: %s", name, error)


def _acquire(
    client: SyncPrefectClient, name: str, count: int, stopping: threading.Event, tell: Callable[[str], None]
) -> UUID:
    since: float | None = None
    while True:
        try:
            answer = client.increment_concurrency_slots_with_lease([name], count, "concurrency", LEASE_SECONDS)
            if since is not None:
                tell(f"has {count} of {name!r} after {time.monotonic() - since:.0f} s")
            return UUID(answer.json()["lease_id"])
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.LOCKED:
                raise
        if since is None:
            since = time.monotonic()
            tell(f"waiting for {count} of {name!r}")
        if stopping.wait(ASK_SECONDS):
            raise StageStopped("the stage was not started: the run ended while it waited for slots", expected=True)


def _renew(name: str, lease: UUID, done: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not done.wait(LEASE_SECONDS / 3):
            try:
                client.renew_concurrency_lease(lease, LEASE_SECONDS)
            except (httpx.HTTPError, ObjectNotFound) as error:  # the stage goes on: stopping it would lose more
                logger.warning("the slots of %r were not renewed: %s", name, error)
