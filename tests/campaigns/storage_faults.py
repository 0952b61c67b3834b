"""A store that fails: call k of a small recipe, once and for ever, for every k and every kind of fault, on a remote
store and on a local disk; then one call in ten at random.

Nothing wrong and nothing partial is ever seen; what was acknowledged is not done again, unless that is said; where a
run gives up, it names operation, object, attempts and next step, and the next run ends with the right artifacts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

from artifacts import Store
from artifacts.disk import UNSYNCED
from artifacts.local import LocalFiles
from artifacts.manifest import library_versions
from artifacts.materialize import problems_of
from artifacts.remote import RemoteFiles
from artifacts.retry import Patience
from flows.recipe import Recipe
from tests.campaigns.disk_faults import DISK_FAULTS, FaultyDisk
from tests.campaigns.interposed import FAULTS, Fault, Interposed, at
from tests.campaigns.outcome import Outcome
from tests.campaigns.small_recipe import Attempt, attempt, installed

ERROR = re.compile(r"cannot [a-z ]+ (memory://|/)\S*.* after \d+ attempts?( in \d+ s)?: .+; .+")
"""What a surrender says: operation, object, attempts, cause, next step."""
SHARE = 0.1
"""Of the calls that fail at random."""
Decide = Callable[[int, str], Fault | None]


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self) -> Patience:
        return Patience(deadline=60, sleep=self.sleep, clock=lambda: self.now)


@dataclass
class Remote:
    """A store in memory. `calls`: how many the last faulty attempt made; `met`: how many of them failed."""

    folder: Path
    number: int = 0
    calls: int = 0
    met: int = 0

    def healthy(self) -> Store:
        return self._store(lambda: MemoryFileSystem(skip_instance_cache=True), Patience())

    @contextlib.contextmanager
    def faulty(self, decide: Decide) -> Iterator[Store]:
        fs = Interposed(MemoryFileSystem(skip_instance_cache=True), decide)
        yield self._store(lambda: fs, Clock().patience())
        self.calls, self.met = fs.calls, fs.met

    def _store(self, make: Callable[[], Any], patience: Patience) -> Store:
        base = f"/{self.folder.name}-{self.number}"
        return Store(RemoteFiles(f"memory:/{base}", base, make, patience), self.folder / "cache")

    def clear(self) -> None:
        """The next attempt meets an empty store."""
        with contextlib.suppress(FileNotFoundError):
            MemoryFileSystem(skip_instance_cache=True).rm(f"/{self.folder.name}-{self.number}", recursive=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.number += 1


@dataclass
class Local:
    """A store on a local disk."""

    folder: Path
    number: int = 0
    calls: int = 0
    met: int = 0

    def healthy(self) -> Store:
        return Store(LocalFiles(self.folder / "store"), self.folder / "cache")

    @contextlib.contextmanager
    def faulty(self, decide: Decide) -> Iterator[Store]:
        disk = FaultyDisk(decide)
        files = LocalFiles(self.folder / "store")
        files._disk = disk
        yield Store(files, self.folder / "cache")
        self.calls, self.met = disk.calls, disk.met

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.number += 1


Place = Remote | Local


class Trial:
    """The recipe on a failing store, and on the same store when it is well again."""

    def __init__(self, recipe: Recipe, place: Place, expected: dict[str, str]) -> None:
        self.recipe, self.place, self.expected = recipe, place, expected

    def problems(self, decide: Decide, done_before: bool, passes: bool = False) -> list[str]:
        """What went wrong beyond the failure itself. `done_before`: the store holds it all already; `passes`: the
        fault does, so that the run must end well."""
        self.place.clear()
        before = attempt(self.recipe, self.place.healthy()) if done_before else Attempt()
        with self.place.faulty(decide) as store:
            during = attempt(self.recipe, store)
        healthy = self.place.healthy()
        found = [f"gave up in other words: {error}" for error in during.errors if not ERROR.fullmatch(error)]
        if passes:
            found += [f"gave up for what passes: {error}" for error in during.errors]
        found += unsound(healthy)
        if during.well and during.outputs != self.expected:
            found.append(f"ended well with {during.outputs}")
        after = attempt(self.recipe, healthy)
        if not after.well or after.outputs != self.expected:
            found.append(f"the next run ended with {after.errors or after.outputs}")
        acknowledged = before.acknowledged
        for tried in (during, after):
            again = acknowledged & set(tried.worked_on)
            if again and not any("damaged" in warning for warning in tried.warnings):
                found += [f"silently done again: {fingerprint[:8]}" for fingerprint in again]
            acknowledged = acknowledged | tried.acknowledged
        return found


def unsound(store: Store) -> list[str]:
    """What counts and is not right."""
    found = []
    for artifact in filter(store.is_intact, store.artifacts()):
        problems = problems_of(store.files, artifact.key, "files", store.manifest(artifact).files)
        found += [f"{artifact}: {problem}" for problem in problems]
    return found


def systematic(
    trial: Trial,
    faults: tuple[Fault, ...],
    outcome: Outcome,
    first: int = 1,
    step: int = 1,
    for_ever: tuple[bool, ...] = (False, True),
) -> None:
    """Every call (from `first` on every `step`th), every fault that it can meet, once and for ever, on an empty store
    and on one that holds everything."""
    ways = itertools.product(faults, for_ever, (False, True))
    for fault, lasting, done_before in ways:
        for number in itertools.count(first, step):
            passes = fault.passes and not lasting
            found = trial.problems(at(number, fault, lasting), done_before, passes)
            if trial.place.calls < number:
                break
            if trial.place.met == 0:
                continue  # no call of a kind that can fail so
            outcome.counts["faulty runs"] += 1
            where = f"{type(trial.place).__name__}, {fault} {'from' if lasting else 'at'} call {number}"
            where += ", all done before" if done_before else ""
            outcome.anomalies += [f"{where}: {text}" for text in found]


def at_random(trial: Trial, seeds: range, faults: tuple[Fault, ...], outcome: Outcome) -> None:
    """One call in ten fails."""
    for seed in seeds:
        rng = random.Random(seed)

        def decide(number: int, name: str, rng: random.Random = rng) -> Fault | None:
            possible = [fault for fault in faults if name in fault.meets]
            return rng.choice(possible) if possible and rng.random() < SHARE else None

        found = trial.problems(decide, done_before=bool(seed % 2))
        outcome.counts["runs with faults at random"] += 1
        outcome.counts["faults"] += trial.place.met
        outcome.anomalies += [f"{type(trial.place).__name__}, seed {seed}: {text}" for text in found]


@contextlib.contextmanager
def trials() -> Iterator[list[tuple[Trial, tuple[Fault, ...]]]]:
    """The recipe on both kinds of store, with the faults that each may meet."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as temporary,
        installed() as recipe,
        mock.patch.dict(os.environ, {UNSYNCED: "1"}),
        mock.patch("artifacts.leases.is_dead", lambda tag: True),
    ):
        library_versions()
        found: list[tuple[Trial, tuple[Fault, ...]]] = []
        for place, faults in (
            (Remote(Path(temporary) / "remote"), FAULTS),
            (Local(Path(temporary) / "l"), DISK_FAULTS),
        ):
            clean = attempt(recipe, place.healthy())
            assert clean.well, clean.errors
            found.append((Trial(recipe, place, clean.outputs), faults))
        yield found


def campaign(count: int, seed: int) -> Outcome:
    """Every fault at every call; with `count` > 1 only at every so manieth call, the first one by the seed."""
    outcome = Outcome(seed)
    with trials() as both:
        for trial, faults in both:
            systematic(trial, faults, outcome, first=1 + seed % count, step=count)
    return outcome


def random_campaign(count: int, seed: int) -> Outcome:
    """So many runs with faults at random, three of four on the remote store."""
    outcome = Outcome(seed)
    with trials() as both:
        for number in range(seed * count, seed * count + count):
            trial, faults = both[number % 4 == 3]
            at_random(trial, range(number, number + 1), faults, outcome)
    return outcome
