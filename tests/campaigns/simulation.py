"""Millions of operations on stores in memory: what is put, named, recorded, saved and collected, while processes die
and calls fail, and after every one of them what is seen is what a model of the store says.

A cycle is a fresh store and CYCLE operations on it. Between cycles nothing of a store stays, and the process holds what
it held before.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import psutil

from artifacts import DamagedError, Store, StoreError
from artifacts.remote import RemoteFiles
from artifacts.retry import Patience
from tests.campaigns.flatness import MEMORY_SHARE, Series, described, grown
from tests.campaigns.interposed import FAULTS, SHORT, Decide, Fault, Interposed, Killed, at, death
from tests.campaigns.objects import Objects
from tests.campaigns.outcome import Outcome
from tests.campaigns.places import Clock
from tests.campaigns.simulated_keys import KINDS, Change, Key, Value, collected
from tests.campaigns.soak_driver import give_back
from tests.campaigns.store_kills import every_holder_is_dead

CYCLE = 5000
LOOKS = 0.5
"""Share of the operations that read a key drawn at random."""
COLLECTED_EVERY = 1000
"""Operations."""
TROUBLE = 0.2
"""Share of the changes that are struck, half by a death, half by a fault."""
ENOUGH_CYCLES = 40
"""To say whether memory grows."""
LINE_EVERY = 20
DAMAGED = "damaged"
"""Named as such by whoever reads it."""


@dataclass
class World:
    """One store and what it must show. `now`: key -> its value."""

    folder: Path
    draws: random.Random
    outcome: Outcome
    objects: Objects = field(default_factory=Objects)
    now: dict[Key, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = {(kind, number): one.empty for kind, one in KINDS.items() for number in range(one.keys)}
        self._keys = list(self.now)
        self._changing = [name for name, kind in KINDS.items() for _ in range(kind.weight)]

    def store(self, decide: Decide | None = None) -> Store:
        """As a process that has just begun opens it; with `decide` it meets trouble."""
        fs = self.objects if decide is None else Interposed(self.objects, decide)
        patience = Patience() if decide is None else Clock().patience()
        return Store(RemoteFiles("memory://simulated", "/simulated", lambda: fs, patience), self.folder / "cache")

    def step(self, number: int) -> None:
        """One operation, and what is seen after it."""
        if number % COLLECTED_EVERY == 0:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)  # the larger, the slower
            self.do(collected(self.now))
        elif self.draws.random() < LOOKS:
            self.look(self.draws.choice(self._keys))
        else:
            name = self.draws.choice(self._changing)
            change = KINDS[name].change(self.now, self.draws.randrange(KINDS[name].keys), self.draws)
            if change is not None:
                self.do(change)

    def look(self, key: Key) -> None:
        """A key shows what it must."""
        self._count(f"read: {key[0]}")
        self._see(key, {self.now[key]}, "looked at")

    def do(self, change: Change) -> None:
        """A change in full, or struck; then every key that it touches shows what it may."""
        self._count(change.name)
        fault, for_ever = self.draws.choice(FAULTS), self.draws.random() < 0.5
        broken = self._tried(change, self._trouble(fault, for_ever, change.calls))
        # what is overwritten with half of it, again and again, is damaged: said to be, and whole after the next time
        half = {DAMAGED} if broken and fault is SHORT and for_ever else set()
        for key, passes in change.passes.items():
            allowed = {self.now[key], *passes} | half if broken else {passes[-1]}
            self._see(key, allowed, f"{change.name}{', broken off' if broken else ''}")
        if half and DAMAGED in (self.now[key] for key in change.passes):
            self.outcome.counts["damaged and mended"] += 1
            self._tried(change, None)
            for key, passes in change.passes.items():
                self._see(key, {passes[-1]}, f"{change.name}, once more")

    def _tried(self, change: Change, trouble: Decide | None) -> bool:
        """True: it was broken off."""
        try:
            change.act(self.store(trouble), self.folder / "made")
        except Killed:
            self.outcome.counts["deaths"] += 1
            return True
        except StoreError as error:
            self.outcome.counts["surrenders"] += 1
            if trouble is None:
                self.outcome.anomalies.append(f"{change.name}: failed on a store that is well: {error}")
            return True
        return False

    def _trouble(self, fault: Fault, for_ever: bool, calls: int) -> Decide | None:
        if self.draws.random() >= TROUBLE:
            return None
        number = self.draws.randint(1, calls)
        if self.draws.random() < 0.5:
            return death(number, after=self.draws.random() < 0.5)
        return at(number, fault, for_ever)

    def _see(self, key: Key, allowed: set[Value], when: str) -> None:
        try:
            value = KINDS[key[0]].read(self.store(), key[1])
        except DamagedError:
            value = DAMAGED
        if value not in allowed:
            self.outcome.anomalies.append(f"{key}, {when}: is {value}, expected {sorted(map(str, allowed))}")
        self.now[key] = value

    def end(self) -> None:
        """Everything shows what it must, and after a collection nothing is left over."""
        for key in self.now:
            self.look(key)
        change = collected(self.now)
        self._count(change.name)
        self._tried(change, None)
        for key, passes in change.passes.items():
            self._see(key, {passes[-1]}, "collected at the end")
        left = [key for name in ("tmp", "claims", "gc") for key in self.store().files.tree(name)]
        self.outcome.anomalies += [f"{key} is left" for key in left]

    def _count(self, name: str) -> None:
        self.outcome.counts["operations"] += 1
        self.outcome.counts[name] += 1


@dataclass
class Flat:
    """What this process holds, cycle by cycle."""

    folder: Path
    process: psutil.Process = field(default_factory=psutil.Process)
    samples: dict[str, array[float]] = field(default_factory=dict)
    """One a cycle; tuples of numbers would themselves be the memory that grows."""

    def take(self) -> None:
        give_back()
        now = {
            "memory": self.process.memory_info().rss,
            "handles": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "children": len(self.process.children(recursive=True)),
            "temporary files": sum(len(files) for _, _, files in os.walk(self.folder)),
        }
        for what, value in now.items():
            self.samples.setdefault(what, array("d")).append(value)

    def series(self) -> list[Series]:
        return [
            Series(what, list(enumerate(found, 1)), MEMORY_SHARE if what == "memory" else None)
            for what, found in self.samples.items()
        ]


class OneThread:
    """A pool that works in order: which call meets a fault follows from the seed alone, and no time goes into starting
    threads, which took half of it."""

    def __init__(self, threads: int) -> None:
        self.map = map

    def __enter__(self) -> OneThread:
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to end."""


@contextlib.contextmanager
def _quickly() -> Iterator[Path]:
    """A folder in memory; who died is known to be dead."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as folder,
        every_holder_is_dead(),
        mock.patch("artifacts.folder.ThreadPoolExecutor", OneThread),
        mock.patch("artifacts.retention.is_dead", lambda tag: True),
    ):
        yield Path(folder)


def campaign(count: int, seed: int) -> Outcome:
    """At least so many operations."""
    outcome, draws = Outcome(seed), random.Random(seed)
    with _quickly() as folder:
        flat = Flat(folder)
        cycle = 0
        while outcome.counts["operations"] < count:
            cycle += 1
            world = World(folder, draws, outcome)
            for number in range(1, min(CYCLE, count) + 1):
                world.step(number)
            world.end()
            del world
            shutil.rmtree(folder / "cache", ignore_errors=True)
            shutil.rmtree(folder / "made", ignore_errors=True)
            flat.take()
            if cycle % LINE_EVERY == 0:
                print(f"{cycle} cycles, {outcome.counts['operations']:,} operations", flush=True)
    if cycle >= ENOUGH_CYCLES:
        outcome.anomalies += filter(None, map(grown, flat.series()))
        outcome.notes += map(described, flat.series())
    outcome.counts = shown(outcome.counts, cycle)
    return outcome


def shown(counts: Mapping[str, int], cycles: int) -> Counter[str]:
    """The figures of the line: all operations first, then what they were."""
    rest = {name: count for name, count in sorted(counts.items()) if name != "operations"}
    return Counter({"simulated operations": counts["operations"], "cycles": cycles, **rest})
