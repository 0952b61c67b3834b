"""New homes of Prefect: to make a database takes four seconds of a core, to copy one none."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.server import temporary_server

NewHome = Callable[[Path], Path]
"""A folder that is not there yet -> the same with a database in it."""


@pytest.fixture(scope="session")
def new_prefect_home(tmp_path_factory: pytest.TempPathFactory) -> NewHome:
    """The database is made once for all workers. Tests of a user's very first run let Prefect make its own."""
    base = tmp_path_factory.getbasetemp()
    unused = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "unused_prefect"
    with open(f"{unused}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not unused.exists():
            made = tmp_path_factory.mktemp("prefect_made")
            with temporary_server(made) as server:
                server.wait()
            shutil.move(made, unused)

    def new_home(home: Path) -> Path:
        home.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(unused / "prefect.db") as source, sqlite3.connect(home / "prefect.db") as target:
            source.backup(target)
        return home

    return new_home
