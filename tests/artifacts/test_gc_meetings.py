"""Garbage collection beside those who use what it would delete: at whatever step they meet, nothing in use goes."""

import os
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from artifacts import Artifact, Store, claims, open_store
from artifacts.disk import UNSYNCED
from artifacts.retention import Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from tests.artifacts.test_gc import put
from tests.waiting import LIMIT_SECONDS


def make_old(store: Store, artifact: Artifact) -> None:
    """Its manifest was written long ago."""
    key = f"{artifact.key}/manifest.json"
    if store.is_local:
        os.utime(store.files.path(key), (1, 1))
    else:
        held = store.files.fs.store[store.files.path(key)]
        held.created = held.modified = datetime(2020, 1, 1, tzinfo=UTC)


class Gate:
    """Files of which call number `at` waits until `go` is set, having said `there`."""

    def __init__(self, files, at: int) -> None:
        self.files, self.at, self.calls = files, at, 0
        self.there, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str):
        value = getattr(self.files, name)
        if not callable(value):
            return value

        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.at:
                self.there.set()
                assert self.go.wait(LIMIT_SECONDS)
            return value(*arguments, **options)

        return call


def use_again(store: Store, artifact: Artifact, folder) -> bool:
    """A run that takes it from the store: what it is told is what it relies on."""
    return store.renew(artifact)


def put_again(store: Store, artifact: Artifact, folder) -> bool:
    assert store.put("model", folder, producer={}) == artifact
    return True


def claim_it(store: Store, artifact: Artifact, folder) -> bool:
    store.claim("run", [artifact])
    return store.is_intact(artifact)


def pause(seconds: float, waits: threading.Event) -> None:
    """In the place of a pause of who waits for a sweep."""
    waits.set()
    time.sleep(seconds)


def meetings(use, paused: str, kind: str, tmp_path, fill, monkeypatch) -> tuple[list[str], set[tuple[object, object]]]:
    """(what was wrong, what the two were told) when the sweeper or the user stands still before each of its calls in
    turn, while the other one does all of its work or waits for the first."""
    wrong, told = [], set()
    for at in range(1, 200):
        store = open_store(f"memory://{tmp_path.name}-{at}" if kind == "memory" else str(tmp_path / str(at)))
        artifact = put(store, fill, "a")
        make_old(store, artifact)
        sweeping, using = open_store(store.url), open_store(store.url)
        halted = sweeping if paused == "sweeper" else using
        halted.files = gate = Gate(halted.files, at)
        results: dict[str, object] = {}
        folder = fill({"a": b"a"})

        def delete(there=sweeping, results=results):
            results["swept"] = len(sweep(there, survey(there, Policy()), "gc").deleted)

        def take(there=using, results=results, artifact=artifact, folder=folder):
            results["used"] = use(there, artifact, folder)

        first, second = (delete, take) if paused == "sweeper" else (take, delete)
        one, two = threading.Thread(target=first), threading.Thread(target=second)
        waits = threading.Event()
        monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=lambda seconds, waits=waits: pause(seconds, waits)))
        one.start()
        while not gate.there.wait(0.002) and one.is_alive():
            pass
        if not gate.there.is_set():
            return wrong, told
        two.start()
        while two.is_alive() and not waits.wait(0.002):
            pass  # it ends, or it waits for the one that stands still
        gate.go.set()
        one.join(LIMIT_SECONDS)
        two.join(LIMIT_SECONDS)
        told.add((results["swept"], results["used"]))
        if results["used"] and not (store.is_intact(artifact) and store.verify(artifact) == []):
            wrong.append(f"{at}: used and deleted")
        if not results["used"] and store.files.tree(artifact.key):
            wrong.append(f"{at}: half deleted")
        if store.files.tree("gc") or (store.files.tree("claims") and use is not claim_it):
            wrong.append(f"{at}: something is left")
    raise AssertionError("it never ends")


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(claims, "_SECONDS_BETWEEN_LOOKS", 0.002)
    monkeypatch.setenv(UNSYNCED, "1")


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("use", [use_again, put_again, claim_it])
@pytest.mark.parametrize("paused", ["sweeper", "user"])
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_whoever_uses_it_and_whoever_deletes_it_meet_at_every_step(use, paused, kind, tmp_path, fill, monkeypatch):
    wrong, told = meetings(use, paused, kind, tmp_path, fill, monkeypatch)
    assert wrong == [] and len(told) > 1, told


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("forgets", ["user", "sweeper"])
def test_one_that_does_not_look_is_found(forgets, tmp_path, fill, monkeypatch):
    if forgets == "user":
        monkeypatch.setattr(claims, "await_sweep", lambda files, artifacts: False)
    else:
        monkeypatch.setattr("artifacts.sweep._needed_now", lambda *arguments: set())
        monkeypatch.setattr(
            "artifacts.sweep._delete_artifact",
            lambda store, artifact, item: store.files.remove(artifact.key, first="manifest.json") is None,
        )
    found = [
        meetings(use, "sweeper", "memory", tmp_path / use.__name__, fill, monkeypatch)[0]
        for use in (use_again, put_again)
    ]
    assert any(found), found
