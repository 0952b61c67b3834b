"""What the database of Prefect's server takes in memory, in a process of its own: the limits are those of a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import LIMIT_SECONDS

PROGRAM = """
import asyncio, contextlib, sys
from flows.server_process import keep_sqlite_small

if sys.argv[2] == "kept small":
    keep_sqlite_small()
import psutil
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine


async def work(connection):
    await connection.execute(text("PRAGMA cache_size = 20000"))  # as Prefect does
    assert (await connection.execute(text("SELECT sum(length(page)) FROM pages"))).scalar() == 10_000 * 4000
    for rows in range(60, 160):  # batches of events, each of another size
        insert = "INSERT INTO events VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * rows)
        await connection.exec_driver_sql(insert, (None,) * 7 * rows)
        await connection.rollback()


async def main():
    engine = create_async_engine(f"sqlite+aiosqlite:///{sys.argv[1]}")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE events (a, b, c, d, e, f, g)"))
        await connection.execute(text("CREATE TABLE pages (page)"))
        made = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)"
        await connection.execute(text(f"INSERT INTO pages {made} SELECT zeroblob(4000) FROM n"))
    await engine.dispose()
    before = psutil.Process().memory_info().rss
    async with contextlib.AsyncExitStack() as stack:
        for connection in [await stack.enter_async_context(engine.connect()) for _ in range(3)]:
            await work(connection)
        print((psutil.Process().memory_info().rss - before) / 1e6)


asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "least", "most"), [("kept small", 0, 60), ("as it is", 110, 300)])
def test_pages_and_statements_of_every_connection_together(how: str, least: float, most: float, tmp_path: Path) -> None:
    # each of three connections would keep 40 MB of pages and 11 MB of statements, 100 of 60 to 160 kB
    run = [sys.executable, "-c", PROGRAM, str(tmp_path / "database"), how]
    done = subprocess.run(run, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert least < float(done.stdout) < most
