"""Two troubles in a row: a process that dies or a store that fails in the middle of what was to make up for the first.

Half of the pairs are of single operations on a store, half of whole runs of a small recipe that resumes.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from artifacts import Store, StoreError
from artifacts.local import LocalFiles
from tests.campaigns.disk_faults import DISK_FAULTS, FaultyDisk
from tests.campaigns.interposed import FAULTS, SHORT, Fault, Interposed, Killed, at, death
from tests.campaigns.operations import HALF, OPERATIONS, Bench, Expected, Operation, Value, reset
from tests.campaigns.outcome import Outcome
from tests.campaigns.places import Clock
from tests.campaigns.small_recipe import attempt
from tests.campaigns.storage_faults import Trial, trials, unsound
from tests.campaigns.store_kills import MOST_RECORDS, Local, Memory, Victim, every_holder_is_dead

MOST_CALLS = 30
RUN_CALLS = 230
SPOILED: frozenset[Value] = frozenset([HALF, "another"])
"""What a place shows whose one file was overwritten with half of it, again and again: damage, which is said."""
Strike = Callable[[Victim, Operation, Value], tuple[bool, frozenset[Value]]]
"""Does an operation in the midst of trouble: whether it was broken off, and what may be seen then besides."""


def _killed(rng: random.Random) -> Strike:
    last, after = rng.randint(1, MOST_CALLS), rng.random() < 0.5
    return lambda victim, operation, before: (victim.dies(operation, before, last, after), frozenset())


def _failing(rng: random.Random) -> Strike:
    number, for_ever, of_disk, of_store = (
        rng.randint(1, MOST_CALLS),
        rng.random() < 0.7,
        rng.choice(DISK_FAULTS),
        rng.choice(FAULTS),
    )

    def strike(victim: Victim, operation: Operation, before: Value) -> tuple[bool, frozenset[Value]]:
        with _failing_store(victim, number, for_ever, of_disk, of_store) as store:
            try:
                operation.act(Bench(store, victim.folder / "made"), before)
            except StoreError:
                halves = for_ever and of_store is SHORT and isinstance(victim, Memory)
                return True, SPOILED if halves else frozenset()
        return False, frozenset()

    return strike


@contextlib.contextmanager
def _failing_store(victim: Victim, number: int, for_ever: bool, of_disk: Fault, of_store: Fault) -> Iterator[Store]:
    if isinstance(victim, Memory):
        fs = Interposed(victim.inner(), at(number, of_store, for_ever))
        files = victim.files(lambda: fs)
        files._patience = Clock().patience()
        yield Store(files, victim.folder / "cache")
    else:
        local = LocalFiles(victim.folder / "store")
        local._disk = FaultyDisk(at(number, of_disk, for_ever))
        yield Store(local, victim.folder / "cache")


def of_operations(victim: Victim, count: int, outcome: Outcome, rng: random.Random) -> None:
    """An operation broken off twice, then done in full."""
    expected, pairs = Expected.of(victim.open()), 0
    while pairs < count:
        operation = rng.choice(OPERATIONS)
        if operation.name == "record" and len(expected.now("record")) > MOST_RECORDS:
            continue
        reset(victim.bench, operation.place)
        expected.see(victim.open(), operation.place)
        strikes = [rng.choice((_killed, _failing))(rng) for _ in range(2)]
        broken = [_struck(victim, operation, expected, strike, outcome) for strike in strikes]
        outcome.anomalies += _done(victim, operation, expected)
        if all(broken):
            pairs += 1
            outcome.counts["pairs of troubles"] += 1
            if pairs % 20 == 0:
                outcome.anomalies += [f"{operation.name}, twice: {text}" for text in expected.problems(victim.open())]


def _struck(victim: Victim, operation: Operation, expected: Expected, strike: Strike, outcome: Outcome) -> bool:
    before = expected.now(operation.place)
    expected.begin(operation)
    broken, spoiled = strike(victim, operation, before)
    if not broken:
        expected.end(operation, before)
    expected.values[operation.place] |= spoiled
    store = victim.open()
    name = f"{type(victim).__name__}: {operation.name}"
    outcome.anomalies += [f"{name}: {text}" for text in expected.problems(store, [operation.place])]
    expected.see(store, operation.place)
    if expected.now(operation.place) in spoiled:
        operation.act(victim.bench, before)
        expected.see(store, operation.place)
        if expected.now(operation.place) in spoiled:
            outcome.anomalies.append(f"{name}: is not mended by the next one")
    return broken


def _done(victim: Victim, operation: Operation, expected: Expected) -> list[str]:
    before = expected.now(operation.place)
    expected.begin(operation)
    operation.act(victim.bench, before)
    expected.end(operation, before)
    problems = expected.problems(victim.open(), [operation.place])
    expected.see(victim.open(), operation.place)
    return [f"{type(victim).__name__}: {operation.name}, in full: {text}" for text in problems]


def of_runs(trial: Trial, count: int, outcome: Outcome, rng: random.Random) -> None:
    """A run that is killed, the next one killed or on a failing store, the third one in full."""
    for _ in range(count):
        trial.place.clear()
        done: set[str] = set()
        decisions = [death(rng.randint(1, RUN_CALLS), rng.random() < 0.5)]
        decisions.append(
            death(rng.randint(1, RUN_CALLS), rng.random() < 0.5)
            if rng.random() < 0.5
            else at(rng.randint(1, RUN_CALLS), rng.choice(FAULTS), rng.random() < 0.7)
        )
        for decide in decisions:
            with contextlib.suppress(Killed), trial.place.faulty(decide) as store:
                tried = attempt(trial.recipe, store)
                again = done & set(tried.worked_on)
                if again and not any("damaged" in warning for warning in tried.warnings):
                    outcome.anomalies.append(f"silently done again: {sorted(again)}")
                done |= tried.acknowledged
            outcome.anomalies += unsound(trial.place.healthy())
        last = attempt(trial.recipe, trial.place.healthy())
        outcome.counts["pairs of troubles"] += 1
        if last.outputs != trial.expected:
            outcome.anomalies.append(f"after two troubles: {last.errors or last.outputs}")


def campaign(count: int, seed: int) -> Outcome:
    """So many pairs."""
    outcome, rng = Outcome(seed), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, every_holder_is_dead():
        of_operations(Local(Path(temporary) / "local"), count // 4, outcome, rng)
        of_operations(Memory(Path(temporary) / "memory"), count // 4, outcome, rng)
    with trials() as both:
        of_runs(both[0][0], count - 2 * (count // 4), outcome, rng)
    return outcome
