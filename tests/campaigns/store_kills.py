"""A process that dies before or after any call to its store, on local disk, in memory and on S3: what is seen then was
acknowledged or was being written, and the next process goes on from there.

On a local disk a forked process really ends. Behind a remote store nothing that the dead one still tries gets there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from artifacts import Store
from artifacts.disk import UNSYNCED
from artifacts.local import LocalFiles
from artifacts.manifest import library_versions
from artifacts.memory import locked_memory
from artifacts.remote import RemoteFiles
from artifacts.retry import Patience
from artifacts.s3 import S3Files
from tests.artifacts.dying import DIED, DyingDisk, in_child
from tests.campaigns.interposed import Interposed, Killed, death
from tests.campaigns.operations import OPERATIONS, PLACES, Bench, Expected, Operation, Value, prepare, reset
from tests.campaigns.outcome import Outcome
from tests.campaigns.s3 import s3_server

MOST_RECORDS = 40
ALL_PLACES_EVERY = 20
SHARES = {"local": 0.4, "memory": 0.5, "s3": 0.1}
NO_PATIENCE = Patience(deadline=0, sleep=lambda seconds: None)


class Victim:
    """A prepared store, and processes that die while they work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bench = Bench(self.open(), folder / "made")
        prepare(self.bench)

    def open(self) -> Store:
        """The store as the next process sees it."""
        raise NotImplementedError

    def dies(self, operation: Operation, before: Value, last: int, after: bool) -> bool:
        """Whether the operation got as far as its call `last`, before or after which its process died."""
        raise NotImplementedError


class Local(Victim):
    def open(self) -> Store:
        return Store(LocalFiles(self.folder / "store"), self.folder / "cache")

    def dies(self, operation: Operation, before: Value, last: int, after: bool) -> bool:
        def work() -> None:
            files = LocalFiles(self.folder / "store", DyingDisk(last, after))
            operation.act(Bench(Store(files, self.folder / "cache"), self.folder / "made"), before)

        status = in_child(work)
        assert status in (0, DIED), f"{operation.name} ended with {status}"
        return status == DIED


class Memory(Victim):
    protocol = "memory://"

    def __init__(self, folder: Path) -> None:
        self.url = f"{self.protocol}{uuid.uuid4().hex}"
        super().__init__(folder)

    def files(self, make: Callable[[], Any]) -> RemoteFiles:
        return RemoteFiles(self.url, "/" + self.url.removeprefix("memory://"), make, NO_PATIENCE)

    def inner(self) -> Any:
        return locked_memory()

    def open(self) -> Store:
        return Store(self.files(self.inner), self.folder / "cache")

    def dies(self, operation: Operation, before: Value, last: int, after: bool) -> bool:
        fs = Interposed(self.inner(), death(last, after))
        bench = Bench(Store(self.files(lambda: fs), self.folder / "cache"), self.folder / "made")
        try:
            operation.act(bench, before)
        except Killed:
            return True
        return False


class S3(Memory):
    """On the server whose address is in the environment."""

    protocol = "s3://kills/"

    def __init__(self, folder: Path, client: Any) -> None:
        self.client = client
        super().__init__(folder)

    def files(self, make: Callable[[], Any]) -> RemoteFiles:
        return S3Files(self.url, make, NO_PATIENCE)

    def inner(self) -> Any:
        return self.client


@contextlib.contextmanager
def every_holder_is_dead() -> Iterator[None]:
    """A killed holder of a lease is this process, which lives; so others may take over at once."""
    with mock.patch("artifacts.leases.is_dead", lambda tag: True), mock.patch.dict(os.environ, {UNSYNCED: "1"}):
        library_versions()  # asked once here instead of in every child
        yield


def kills(victim: Victim, outcome: Outcome, rng: random.Random) -> Iterator[None]:
    """Every operation killed before and after every of its calls, in an order drawn at random; yields after each."""
    expected = Expected.of(victim.open())
    points = [(operation, last, after) for operation in OPERATIONS for last in range(1, 80) for after in (False, True)]
    rng.shuffle(points)
    calls = {operation.name: 80 for operation in OPERATIONS}
    for operation, last, after in points:
        if last > calls[operation.name]:
            continue
        if operation.name == "record" and len(expected.now("record")) > MOST_RECORDS:
            continue
        reset(victim.bench, operation.place)
        expected.see(victim.open(), operation.place)
        before = expected.now(operation.place)
        expected.begin(operation)
        if not victim.dies(operation, before, last, after):
            calls[operation.name] = min(calls[operation.name], last)
            expected.end(operation, before)
            continue
        outcome.counts["kills"] += 1
        where = f"{type(victim).__name__}: {operation.name} {'after' if after else 'before'} call {last}"
        places = None if outcome.counts["kills"] % ALL_PLACES_EVERY == 0 else [operation.place]
        store = victim.open()
        outcome.anomalies += [f"{where}: {text}" for text in expected.problems(store, places or PLACES)]
        expected.see(store, operation.place)
        if rng.random() < 0.5:
            outcome.anomalies += [f"{where}, then in full: {text}" for text in finished(victim, operation, expected)]
        yield


def every_kill(kind: type[Victim], folder: Path, seed: int) -> Outcome:
    """One pass over all operations on a new store in a folder."""
    logging.disable(logging.WARNING)  # what is damaged on purpose is named there
    outcome = Outcome(seed)
    with every_holder_is_dead():
        for _ in kills(kind(folder), outcome, random.Random(seed)):
            pass
    return outcome


def finished(victim: Victim, operation: Operation, expected: Expected) -> list[str]:
    """What is wrong after the next process has done it all."""
    before = expected.now(operation.place)
    expected.begin(operation)
    operation.act(victim.bench, before)
    expected.end(operation, before)
    return expected.problems(victim.open(), [operation.place])


def campaign(count: int, seed: int) -> Outcome:
    """At least so many kills, shared out among the three kinds of store; every point of every operation on each."""
    outcome, rng = Outcome(seed), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, every_holder_is_dead(), s3_server("kills") as client:
        makers: dict[str, Callable[[Path], Victim]] = {
            "local": Local,
            "memory": Memory,
            "s3": lambda folder: S3(folder, client),
        }
        for kind, make in makers.items():
            until, passes = outcome.counts["kills"] + count * SHARES[kind], 0
            while outcome.counts["kills"] < until:
                passes += 1
                for _ in kills(make(Path(temporary) / f"{kind}{passes}"), outcome, rng):
                    outcome.counts[f"on {kind}"] += 1
                    if outcome.counts["kills"] >= until and passes > 1:
                        break
    return outcome
