"""Power cuts on a local store: after every step on the disk, whatever the disk had kept of what was not synced,
nothing is seen and wrong, and nothing that was acknowledged is lost.

Operations alone, then all pairs of them, then longer sequences drawn at random.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from artifacts import Store
from artifacts.disk import UNSYNCED
from artifacts.local import LocalFiles
from tests.artifacts.snapshot import RecordingDisk, SnapshotFiles, states
from tests.campaigns.operations import OPERATIONS, Bench, Expected, Operation, Value, perform, prepare
from tests.campaigns.outcome import Outcome

Steps = list[tuple]
UNREAD = ("tmp", "scratch")
"""Folders of a store in which no reader looks."""
Opened = Callable[[Path, RecordingDisk], LocalFiles]


@dataclass
class Recorded:
    """The steps of some operations on a disk, and those that had put there what lay there before."""

    before: Steps
    steps: Steps


def recorded(operations: Sequence[Operation], open_files: Opened = LocalFiles) -> Recorded:
    """What the operations do to a disk, with marks for what may be seen."""
    with tempfile.TemporaryDirectory(dir=_memory()) as temporary, mock.patch.dict(os.environ, {UNSYNCED: "1"}):
        root, cache = Path(temporary) / "store", Path(temporary) / "cache"
        prepare(Bench(Store(LocalFiles(root), cache), root / "scratch"))
        shutil.rmtree(root / "scratch")
        (root / "scratch").mkdir()
        disk = RecordingDisk(root)
        before = disk.restart(root)
        bench = Bench(
            Store(open_files(root, disk), cache), root / "scratch", lambda _: disk.adopt(root / "scratch", synced=False)
        )
        expected = Expected.of(bench.store)
        disk.mark(expected.values)
        with mock.patch.object(shutil, "rmtree", disk.rmtree):
            perform(bench, operations, expected, disk.mark)
        return Recorded(before, disk.steps)


def _memory() -> str | None:
    """Where a folder costs no disk."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def wrongs(given: Recorded, samples: int, rng: random.Random, limit: int = 10**12) -> Iterator[list[str]]:
    """What is wrong in each state."""
    verdicts: dict[object, list[str]] = {}
    for promise, state in itertools.islice(states(given.steps, samples, rng, given.before, UNREAD), limit):
        same = (id(promise), frozenset(state.items()))
        if same not in verdicts:
            verdicts[same] = seen_wrong(promise, state)
        yield verdicts[same]


def seen_wrong(promise: Mapping[str, frozenset[Value]], state: dict[str, bytes]) -> list[str]:
    """What a reader of the state sees and may not see."""
    return Expected(dict(promise)).problems(Store(SnapshotFiles(state), Path("unused")))


def sequences(rng: random.Random) -> Iterator[Sequence[Operation]]:
    """Each operation, each pair, then threes and fours at random."""
    yield from ([operation] for operation in OPERATIONS)
    pairs = list(itertools.product(OPERATIONS, repeat=2))
    yield from rng.sample(pairs, len(pairs))
    while True:
        yield rng.choices(OPERATIONS, k=rng.randint(3, 4))


def campaign(
    count: int, seed: int, samples: int = 200, open_files: Opened = LocalFiles, enough: int = 10**9
) -> Outcome:
    """So many states; ends early when `enough` was wrong."""
    outcome, rng = Outcome(seed), random.Random(seed)
    for operations in sequences(rng):
        left = count - outcome.counts["crash states"]
        if left <= 0 or len(outcome.anomalies) >= enough:
            return outcome
        outcome.counts["protocols"] += 1
        for wrong in wrongs(recorded(operations, open_files), samples, rng, left):
            outcome.counts["crash states"] += 1
            outcome.anomalies += [f"{'; '.join(each.name for each in operations)}: {text}" for text in wrong]
    raise AssertionError("sequences never end")
