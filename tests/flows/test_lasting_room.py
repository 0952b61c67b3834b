"""What a lasting Prefect keeps has a limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.lasting import SERVER, keep_short
from flows.server import clear_logs


def test_old_runs_leave_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

    for name, value in SERVER.items():
        monkeypatch.setenv(name, value)
    found = ServerServicesDBVacuumSettings()
    assert found.enabled_vacuum_types == {"events", "flow_runs"} and found.retention_period.days == 90


def test_what_is_too_long_is_put_aside_once(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with open(log, "ab", buffering=0) as writer:
        for number in range(100):
            os.write(writer.fileno(), b"%03d\n" % number)
            keep_short(log, most=40)
    # 11 lines are more than 40 bytes: 0 to 98 go aside 11 at a time, of which the last 11 are kept
    assert log.read_text() == "099\n"
    before = (tmp_path / "log.before.txt").read_text().split()
    assert before == [f"{number:03d}" for number in range(88, 99)]


def test_of_the_logs_of_servers_that_ended_badly_the_newest_stay(tmp_path: Path) -> None:
    # no system has so many processes
    names = [f"server-{10**9 + number}.log" for number in range(5)]
    for age, name in enumerate([*names, f"server-{os.getpid()}.log", "prefect.db"]):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    clear_logs(tmp_path, most=2)
    # this process lives, though its log is the oldest
    assert {path.name for path in tmp_path.iterdir()} == {*names[:2], f"server-{os.getpid()}.log", "prefect.db"}
