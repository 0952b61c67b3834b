"""`posttrain ui`: a Prefect server and a process worker that stay until they are told to end, and leave nothing.

Server and worker are processes of their own sessions that end with this one, however it ends: the server watches a
pipe, the worker is under the supervisor of stages (`flows.supervise`), which ends its runs and their stages too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType

from artifacts.errors import RequestError, StageError
from flows.command import Command, python_path
from flows.holder import Holder, Place, hold
from flows.server import QUIET, REPORTS, ServerProcess, loopback_without_proxy
from flows.supervisors import Supervisors

POLL_SECONDS = 0.5
LOG_BYTES = 16 * 2**20
"""Of the worker's log, which has all that its runs print; what came before is kept once, in as many bytes."""

SERVER = {
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # leases of slots that a killed server held are found again and expire; in memory they would be taken for ever
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_UI_ENABLED": "1",
    # runs that ended 90 days ago leave its database with their logs; what the store says of them stays
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
}
WORKER = {
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
}


@dataclass(frozen=True)
class Lasting:
    """What is to run. `slots`: name -> size of limits that stages may name in `launch.slots`."""

    home: Path
    port: int
    pool: str
    slots: Mapping[str, int]
    store: str
    alert_url: str | None = field(default=None, repr=False)
    """Where it is told that a deployed run failed."""


def serve(what: Lasting, started: Callable[[Place, bool], None], say: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. `started` is told where it is found, and whether it was there before (then it returns).

    Raises RequestError for a port that is taken, StageError when server or worker end by themselves.
    """
    _require_a_scheduler_that_works()
    with hold(what.home) as held:
        if isinstance(held, Place):
            started(held, True)
            return
        with _told_to_end() as ending, loopback_without_proxy():
            reports = what.home / REPORTS
            reports.mkdir(exist_ok=True)
            # Prefect would prepare its pages in its own package, where it may not write
            settings = {**SERVER, "PREFECT_UI_STATIC_DIRECTORY": str(what.home / "pages")}
            with ServerProcess(what.home, settings, port=what.port, reports=reports) as server:
                _work(what, server, held, ending, started, say)


def _require_a_scheduler_that_works() -> None:
    """Prefect's scheduler fails on SQLAlchemy 2.1 at every run that it inserts, and only the server's log says so."""
    version = metadata.version("sqlalchemy")
    if tuple(map(int, version.split(".")[:2])) >= (2, 1):
        raise RequestError(f"schedules start nothing with SQLAlchemy {version}: pip install 'sqlalchemy<2.1'")


def _work(
    what: Lasting,
    server: ServerProcess,
    held: Holder,
    ending: threading.Event,
    started: Callable[[Place, bool], None],
    say: Callable[[str], None],
) -> None:
    os.environ.update({**QUIET, "PREFECT_HOME": str(what.home)})
    from flows.prefect_api import api
    from flows.prefect_interrupted import drop_checks, go_on
    from flows.prefect_processes import end_dead_runs
    from flows.prefect_upkeep import prepare, stop_runs

    url = server.wait()
    look = _looks(what, server, say)
    with api(url) as client:
        drop_checks(client)
        prepared = prepare(client, what.pool, what.slots)
        for line in (*prepared, *go_on(client, what.pool), *end_dead_runs(client)):
            say(line)
    with _worker(what, url) as alive:
        place = Place(server.address, what.pool, os.getpid())
        held.tell(place)
        started(place, False)
        while not ending.wait(POLL_SECONDS):
            keep_short(_job(what) / "log.txt")
            if server.ended():
                raise StageError(f"Prefect's server ended by itself: {server.last_line()}")
            if not alive():
                raise StageError(f"Prefect's worker ended by itself; its output is in {_job(what) / 'log.txt'}")
            look()
        with api(url) as client:
            for line in stop_runs(client, what.pool, alive):
                say(line)
        look(at_once=True)  # who waits for a run that was interrupted is told


def _looks(what: Lasting, server: ServerProcess, say: Callable[[str], None]) -> Callable[..., None]:
    """Looks now and then, or `at_once`, for runs that were killed or skipped, and for those to be told of."""
    from flows.prefect_alerts import LOOK_SECONDS, Alerts
    from flows.prefect_api import api
    from flows.prefect_processes import end_dead_runs
    from flows.prefect_skipped import name_skipped

    alerts, due = None, 0.0
    if what.alert_url is not None:
        alerts = Alerts(what.alert_url, server.address, what.home, say)
        say(f"deployed runs that fail are told to {alerts.host}")

    def look(at_once: bool = False) -> None:
        nonlocal due
        if time.monotonic() < due and not at_once:
            return
        # a busy server that does not answer is asked again
        with contextlib.suppress(RequestError), api(server.url) as client:
            for line in (*end_dead_runs(client), *name_skipped(client)):
                say(line)
            if alerts is not None:
                alerts.look(client)
        due = time.monotonic() + LOOK_SECONDS

    return look


@contextlib.contextmanager
def _worker(what: Lasting, url: str) -> Iterator[Callable[[], bool]]:
    """A process worker of the pool; yields whether it is alive."""
    job = _job(what)
    job.mkdir(exist_ok=True)
    (job / "exit.json").unlink(missing_ok=True)
    arguments = ["worker", "start", "--pool", what.pool, "--type", "process", "--name", f"posttrain-{os.getpid()}"]
    fixed = {**QUIET, "PREFECT_HOME": str(what.home), "PREFECT_API_URL": url, "POSTTRAIN_STORE": what.store}
    environment = {**WORKER, **os.environ, **python_path(), **fixed}
    with Supervisors() as supervisors:
        command = Command([sys.executable, "-m", "prefect", *arguments], {})
        with supervisors.start(command, job, environment) as process:
            yield lambda: process.poll() is None


def _job(what: Lasting) -> Path:
    return what.home / "worker"


def keep_short(log: Path, most: int = LOG_BYTES) -> None:
    """Puts a log that has become long aside, in the place of what was put there before. Whoever has it open to append
    goes on at its beginning."""
    if log.stat().st_size > most:
        shutil.copyfile(log, log.with_suffix(".before.txt"))
        os.truncate(log, 0)


@contextlib.contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts."""
    ending = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if ending.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
