"""Runs that did not say how they ended: running while their process lives, killed when it is gone."""

import os
import shutil
from datetime import UTC, datetime

import pytest

from artifacts import Artifact, RequestError, Store
from artifacts.retention import Policy
from artifacts.runs import key
from artifacts.sealed import seal
from artifacts.survey import survey
from tests.artifacts.test_gc import later
from tests.artifacts.test_kills import in_child

FINGERPRINT = "ab" * 32
OUTPUT = {"kind": "dataset", "id": "sha256:" + "cd" * 32}


def so_far(made: dict[str, str] = OUTPUT) -> dict[str, object]:
    """One stage has ended, one is at work, one waits."""
    return {
        "run": "r1",
        "stages": {
            "one": {"state": "ran", "outputs": {"out": made}, "error": None, "reason": "first run"},
            "two": {
                "state": "running",
                "fingerprint": FINGERPRINT,
                "outputs": {},
                "error": None,
                "reason": "first run",
            },
            "three": {"state": "waiting", "fingerprint": None, "outputs": {}, "error": None, "reason": "first run"},
        },
    }


def seen(store: Store) -> tuple[str, dict[str, str]]:
    run = store.read_run("r1")
    return run["state"], {name: entry["state"] for name, entry in run["stages"].items()}


RUNNING = ("running", {"one": "ran", "two": "running", "three": "waiting"})
KILLED = ("killed", {"one": "ran", "two": "interrupted", "three": "skipped"})


def elsewhere(store: Store) -> None:
    """The same run by a process of another machine, where nobody can see whether it lives."""
    store.files.write(key("r1"), seal({**so_far(), "state": "running", "process": "othermachine-1-1"}))


def test_a_run_whose_process_lives_is_running(store):
    store.write_running("r1", so_far())
    assert seen(store) == RUNNING and store.runs() == ["r1"]
    store.write_run("r1", {**so_far(), "state": "failed"})
    assert seen(store)[0] == "failed"


def test_a_run_whose_process_was_killed_is_killed_at_once(tmp_path):
    from artifacts import open_store

    store = open_store(str(tmp_path / "store"))
    in_child(lambda: (store.write_running("r1", so_far()), os._exit(9)))
    assert seen(store) == KILLED
    stages = store.read_run("r1")["stages"]
    assert stages["one"]["outputs"] == {"out": OUTPUT}
    assert stages["two"]["error"] == "the run was killed while this stage was at work"
    assert stages["three"]["reason"] == "the run was killed before"
    with pytest.raises(RequestError, match="there is no run 'r2'"):
        store.read_run("r2")


def test_a_killed_run_lasted_until_its_last_sign_of_life(store):
    started = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
    log = store.scratch / "r1/two/log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("step 7")
    os.utime(log, (started.timestamp() + 28.5,) * 2)
    os.utime(log.parent, (1, 1))
    payload = {**so_far(), "started_at": started.isoformat(), "seconds": 7.7}
    store.files.write(key("r1"), seal({**payload, "state": "running", "process": "othermachine-1-1"}))
    assert (store.read_run("r1")["state"], store.read_run("r1")["seconds"]) == ("killed", 28.5)
    os.utime(log, (started.timestamp() + 2,) * 2)
    assert store.read_run("r1")["seconds"] == 7.7  # what it had said itself
    shutil.rmtree(store.scratch / "r1")
    assert store.read_run("r1")["seconds"] == 7.7


def test_a_run_of_another_machine_lives_as_long_as_its_leases(store, monkeypatch):
    elsewhere(store)
    assert seen(store) == KILLED  # a stage is at work and nobody holds its lease
    lease = store.lease(FINGERPRINT, "r1")
    assert lease.acquire() and seen(store) == RUNNING
    lease.release()
    assert seen(store) == KILLED


def test_a_run_of_another_machine_that_works_on_nothing_is_killed_after_an_hour(store, monkeypatch):
    value = so_far()
    del value["stages"]["two"]
    store.files.write(key("r1"), seal({**value, "state": "running", "process": "othermachine-1-1"}))
    for age, state in ((3599.0, "running"), (3601.0, "killed")):
        monkeypatch.setattr(store.files, "age", lambda _, age=age: age)
        assert seen(store)[0] == state


def test_gc_keeps_what_a_killed_run_made(store, fill):
    made = store.put("dataset", fill({"a": b"a"}), producer={"stage": "make"})
    lost = store.put("dataset", fill({"a": b"b"}), producer={"stage": "make"})
    store.files.write(key("r1"), seal({**so_far(made.to_json()), "state": "running", "process": "othermachine-1-1"}))
    goes = {item.artifact for item in survey(later(store, 0.1), Policy(grace_hours=1)).goes}
    assert goes == {Artifact("dataset", lost.digest)}
