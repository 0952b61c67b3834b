"""A Prefect API server that ends with whoever started it: `python server_process.py FD [REPORTS]`, stdin a pipe.

Prefect's own temporary server outlives a killed flow. This one serves on the listening socket FD until a byte comes on
its stdin, and writes what it still holds; or until that is closed, and is gone GRACE_SECONDS later at most. The pages
in the folder REPORTS it gives out under /reports/. Settings come from the environment. Started by its path: it imports
nothing of ours.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

GRACE_SECONDS = 1.0
TRIM_SECONDS = 15.0
STATEMENTS = 16
"""Prepared ones that each connection to the database keeps. Prefect writes events and states by the batch, and the text
of each size of a batch is another one: Python would keep 128 for each connection, of up to 200 kB, hardly ever used
again."""
SQLITE_BYTES = 32 * 2**20
"""What SQLite may take before it uses pages again instead of taking more: Prefect allows each connection 80 MB."""

App = Callable[[Any, Any, Any], Awaitable[None]]


def main() -> None:
    """Serve Prefect's API until stdin says that it is enough."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    reports = sys.argv[2] if len(sys.argv) > 2 else None
    stopping = threading.Event()
    threading.Thread(target=_watch, args=(stopping,), daemon=True).start()
    threading.Thread(target=_give_back_memory, daemon=True).start()

    logging.getLogger("docket.dependencies").addFilter(_is_news)
    keep_sqlite_small()

    import uvicorn

    config = uvicorn.Config(
        lambda: _app(reports),
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        stopping.wait()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    server.run(sockets=[listener])
    sys.stderr.flush()
    os._exit(0)  # all is written by now; to take this interpreter down takes longer than to end the server


def _app(reports: str | None) -> App:
    gc.disable()  # what is made here stays, and looking for what does not takes up to a tenth of the start
    from prefect.server.api.server import create_app

    prefect: App = create_app()
    plan_as_it_is_by_then()
    gc.enable()
    if reports is None:
        return prefect
    from starlette.staticfiles import StaticFiles

    pages = StaticFiles(directory=reports, check_dir=False)

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/reports/"):
            await pages({**scope, "root_path": "/reports"}, receive, send)
        else:
            await prefect(scope, receive, send)

    return serve


def _is_news(record: logging.LogRecord) -> bool:
    """Every poll of a worker marks deployments as ready; on SQLite two at once are one too many, which the next puts
    right. A traceback each would fill the disk."""
    return "mark_deployments_ready(" not in record.getMessage()


def keep_sqlite_small() -> None:
    """Of this process, whatever the address of its database; with another kind of database it changes nothing."""
    import sqlite3

    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def few_statements(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        if dialect.name == "sqlite":
            options["cached_statements"] = STATEMENTS

    event.listen(Engine, "do_connect", few_statements)
    connection = sqlite3.connect(":memory:")
    connection.execute(f"PRAGMA soft_heap_limit = {SQLITE_BYTES}")
    connection.close()


def plan_as_it_is_by_then() -> None:
    """Prefect's scheduler reads schedules, and inserts up to a hundred runs a moment later: those of a deployment that
    was paused in between, or deployed anew, would run all the same. In the transaction that inserts nobody does either.
    """
    from prefect.server import models

    deployments: Any = models.deployments  # its decorators lose the types
    insert = deployments._insert_scheduled_flow_runs

    async def insert_runs(*, session: Any, runs: list[dict[str, Any]]) -> Any:
        inserted = await insert(session=session, runs=runs)
        for deployment_id in {run["deployment_id"] for run in runs}:
            found = await deployments.read_deployment(session=session, deployment_id=deployment_id)
            schedules = await deployments.read_deployment_schedules(session=session, deployment_id=deployment_id)
            active = {entry.id for entry in schedules if entry.active and found is not None and not found.paused}
            if not {run["created_by"]["id"] for run in runs if run["deployment_id"] == deployment_id} <= active:
                # what the schedules are now is planned within a minute
                await deployments._delete_scheduled_runs(
                    session=session, deployment_id=deployment_id, auto_scheduled_only=True
                )
        return inserted

    deployments._insert_scheduled_flow_runs = insert_runs


def _give_back_memory() -> None:
    """What Prefect has freed goes back to the system. glibc keeps it, more with every run: 100 kB, in pieces between
    what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        time.sleep(TRIM_SECONDS)
        trim(0)


def _watch(stopping: threading.Event) -> None:
    sys.stdin.buffer.read(1)
    stopping.set()
    sys.stdin.buffer.read()  # until nobody is there any more
    # uvicorn may wait for a client that never hangs up; SQLite's log makes an abrupt end safe
    threading.Event().wait(GRACE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
