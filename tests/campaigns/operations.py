"""Everything that is done to a store, as operations on places that can be looked at.

A place (an artifact, a checkpoint, an alias, ...) shows one value. An operation says through which values its place
may pass and which one it shows once the operation has returned. So whatever breaks an operation off, a power cut, a
kill or an error, one knows what may be seen: what was acknowledged before, or what was being written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from artifacts import (
    Artifact,
    DamagedError,
    MissingError,
    Record,
    RequestError,
    Store,
    StoreError,
    digest_of,
    sha256_bytes,
)
from artifacts.digest import FileEntry
from artifacts.leases import _parsed
from artifacts.materialize import problems_of
from artifacts.retention import Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from stages.rollouts.reward_cache import RewardCache

FINGERPRINT, OTHER = "ab" * 32, "cd" * 32
Value = Hashable
Read = Callable[[Store], Value]
Files = dict[str, bytes]
ABSENT, WHOLE, UNCOUNTED, UNNOTICED, HALF = "absent", "whole", "damaged, not counted", "damaged, counted", "half there"


def content(number: int) -> Files:
    """The files of an artifact; the number makes the difference."""
    return {"config.json": b"{}", "model/weights.bin": bytes([number]) * 9000, "empty": b""}


def artifact_of(files: Files) -> Artifact:
    """What a store will call these files."""
    return Artifact("model", digest_of(FileEntry(path, len(data), sha256_bytes(data)) for path, data in files.items()))


BASE, SECOND, NEW, DAMAGED, FLIPPED, OLD = (artifact_of(content(number)) for number in range(6))


class Bench:
    """A store to work on, and folders for what goes in. `adopt` is told of files that others than the store wrote."""

    def __init__(self, store: Store, folder: Path, adopt: Callable[[Path], None] = lambda folder: None) -> None:
        self.store, self.folder, self.adopt = store, folder, adopt
        self.made = 0

    def fill(self, files: Files) -> Path:
        """A folder as a stage leaves it: nothing synced."""
        self.made += 1
        folder = self.folder / f"job-{random.getrandbits(40):x}-{self.made}"
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        self.adopt(folder)
        return folder


# what is seen


def artifact_state(artifact: Artifact) -> Read:
    def read(store: Store) -> Value:
        files = store.files.tree(artifact.key)
        if "manifest.json" not in files:
            return ABSENT
        try:
            expected = store.manifest(artifact).files
        except (DamagedError, MissingError):
            return HALF
        wrong = problems_of(store.files, artifact.key, "files", expected)
        if store.is_intact(artifact):
            return UNNOTICED if wrong else WHOLE
        return UNCOUNTED if "damaged.json" in files else HALF

    return read


def recorded(store: Store) -> Value:
    """The tags of the records; HALF when a record's artifact is not there."""
    tags = tuple(sorted(record.provenance["tag"] for record in store.records("sft", FINGERPRINT)))
    return tags if not tags or store.lookup("sft", FINGERPRINT) is not None else HALF


def checkpoint_state(store: Store) -> Value:
    """The newest step; HALF when any that is announced is not all there."""
    checkpoints = store.checkpoints(FINGERPRINT, keep=1)
    for name in checkpoints._names():
        try:
            saved = checkpoints._read(name)
            for entry in saved.files if saved is not None else ():
                if sha256_bytes(store.files.read(f"{checkpoints._key}/{name}/{entry.path}")) != entry.sha256:
                    return HALF
        except (DamagedError, FileNotFoundError):
            return HALF
    return checkpoints.latest_step() or 0


def alias_state(store: Store) -> Value:
    found = store.aliases().get("team/best")
    return "another" if store.files.tree("aliases") and found is None else found


def run_state(store: Store) -> Value:
    try:
        return int(store.read_run("run")["n"])
    except RequestError:
        return 0
    except DamagedError:
        return HALF


def shard_state(store: Store) -> Value:
    """The last version that was saved: while one replaces another both are there, and for a stage both are right."""
    shards = store.shards(FINGERPRINT)
    try:
        shards.load("piece")
    except MissingError:
        return 0
    except DamagedError:
        return HALF
    return max(int(data) for data in shards.load_all())


def rewards_state(store: Store) -> Value:
    """How many rewards are there; HALF when one is not what was paid for, or one before it is gone."""
    known = RewardCache(store.shards(OTHER), "r").known([f"{number}" for number in range(50)])
    return len(known) if known == {f"{number}": number / 4 for number in range(len(known))} else HALF


def lease_state(store: Store) -> Value:
    try:
        body = _parsed(store.files.read(f"work/{FINGERPRINT}/lease.json"))
    except FileNotFoundError:
        return (0, "free")
    return HALF if body is None else (body["number"], "free" if body["free"] else "held")


PLACES: dict[str, Read] = {
    "base": artifact_state(BASE),
    "new": artifact_state(NEW),
    "damaged": artifact_state(DAMAGED),
    "flipped": artifact_state(FLIPPED),
    "old": artifact_state(OLD),
    "record": recorded,
    "checkpoint": checkpoint_state,
    "alias": alias_state,
    "run": run_state,
    "shard": shard_state,
    "rewards": rewards_state,
    "lease": lease_state,
}


# what is done


@dataclass(frozen=True)
class Operation:
    """`through`: the values that its place passes through, given the one it shows now; the last one stays."""

    name: str
    place: str
    act: Callable[[Bench, Value], object]
    through: Callable[[Value], Sequence[Value]]


def _put(number: int) -> Callable[[Bench, Value], object]:
    return lambda bench, _: bench.store.put("model", bench.fill(content(number)), producer={"stage": "sft"})


def _collect(bench: Bench, _: Value) -> None:
    """Garbage collection that finds one artifact to delete; the ages of the others are another test's matter."""
    found = survey(bench.store, Policy())
    found.goes = [item for item in (*found.goes, *found.stays) if item.artifact == OLD]
    sweep(bench.store, found, "gc")


def _notice(bench: Bench, _: Value) -> None:
    """Found it is, whether or not that can be written down; written down, it counts no more."""
    bench.store.verify(FLIPPED)
    if "damaged.json" not in bench.store.files.children(FLIPPED.key):
        raise StoreError("not written down")


def _record(bench: Bench, tags: Value) -> None:
    bench.store.append_record(Record("sft", FINGERPRINT, outputs={"model": BASE}, provenance={"tag": _tag(tags)}))


def _tag(tags: Value) -> int:
    assert isinstance(tags, tuple)
    return 1 + max(tags, default=0)


def _state(step: int, part: int = 0) -> Files:
    return {"state.json": b"%d" % step, "weights": bytes([step % 256, part]) * 3000}


def _save(bench: Bench, step: Value) -> None:
    bench.store.checkpoints(FINGERPRINT, keep=1).save(step + 1, bench.fill(_state(step + 1)))


def _save_in_parts(bench: Bench, step: Value) -> None:
    """Two processes save their shares, and one of them makes the checkpoint count."""
    checkpoints = bench.store.checkpoints(FINGERPRINT, keep=1)
    name = checkpoints.new_name(step + 1)
    for part in (0, 1):
        checkpoints.save_part(name, part, bench.fill(_state(step + 1, part)))
    checkpoints.finish(name, 2)


def _lease(bench: Bench, _: Value) -> None:
    lease = bench.store.lease(FINGERPRINT, "me")
    if not (lease.acquire() and lease.renew()):
        raise StoreError("the lease is not there")
    lease.release()


def _held_and_free(now: Value) -> Sequence[Value]:
    number = 1 + now[0]
    return (number, "held"), (number, "free")


def _reward(bench: Bench, count: Value) -> None:
    RewardCache(bench.store.shards(OTHER), "r").save({f"{count}": count / 4})


def _counted(now: Value) -> Sequence[Value]:
    return (now + 1,)


def _cleared(step: Value) -> Sequence[Value]:
    """Older ones whose deletion was broken off may show once more."""
    return range(step, -1, -1)


OPERATIONS = (
    Operation("put", "new", _put(2), lambda now: (WHOLE,)),
    Operation("put what is there", "base", _put(0), lambda now: (WHOLE,)),
    Operation("put over damage", "damaged", _put(3), lambda now: (WHOLE,)),
    Operation("notice damage", "flipped", _notice, lambda now: (UNCOUNTED,)),
    Operation("gc", "old", _collect, lambda now: (ABSENT,)),
    Operation("record", "record", _record, lambda tags: ((*tags, _tag(tags)),)),
    Operation("checkpoint", "checkpoint", _save, _counted),
    Operation("checkpoint in parts", "checkpoint", _save_in_parts, _counted),
    Operation("clear", "checkpoint", lambda bench, _: bench.store.checkpoints(FINGERPRINT).clear(), _cleared),
    Operation(
        "alias",
        "alias",
        lambda bench, now: bench.store.set_alias("team/best", SECOND if now == BASE else BASE),
        lambda now: (SECOND if now == BASE else BASE,),
    ),
    Operation("run", "run", lambda bench, now: bench.store.write_run("run", {"n": now + 1}), _counted),
    Operation(
        "shard", "shard", lambda bench, now: bench.store.shards(FINGERPRINT).save("piece", b"%d" % (now + 1)), _counted
    ),
    Operation("clear shards", "shard", lambda bench, _: bench.store.shards(FINGERPRINT).clear(), _cleared),
    Operation("rewards", "rewards", _reward, _counted),
    Operation("lease", "lease", _lease, _held_and_free),
)
NAMED = {operation.name: operation for operation in OPERATIONS}


def prepare(bench: Bench) -> None:
    """What lies in the store before: artifacts whole, damaged and noticed, damaged and not noticed yet; unfinished
    work; names."""
    for number in (0, 1):
        bench.store.put("model", bench.fill(content(number)), producer={"stage": "sft"})
    for place in ("new", "damaged", "flipped", "old"):
        reset(bench, place)
    for step in (1, 2):
        bench.store.checkpoints(FINGERPRINT, keep=2).save(step, bench.fill(_state(step)))
    for name in ("alias", "run", "shard", "rewards"):
        NAMED[name].act(bench, 0)


def reset(bench: Bench, place: str) -> None:
    """An artifact as it was before anything was done; the other places go on from what they show."""
    change = {"new": _without_new, "damaged": _with_damage, "flipped": _with_a_flip, "old": _put(5)}.get(place)
    if change is not None:
        change(bench, None)


def _without_new(bench: Bench, _: Value) -> None:
    bench.store.files.remove(NEW.key, first="manifest.json")


def _with_damage(bench: Bench, _: Value) -> None:
    """One file is cut, one is gone, and that was noticed."""
    store = bench.store
    _put(3)(bench, None)
    _replace(store, f"{DAMAGED.key}/files/model/weights.bin", b"cut")
    store.files.delete(f"{DAMAGED.key}/files/empty")
    assert store.verify(DAMAGED)


def _with_a_flip(bench: Bench, _: Value) -> None:
    """A byte is wrong, and nobody knows."""
    _put(4)(bench, None)
    _replace(bench.store, f"{FLIPPED.key}/files/model/weights.bin", b"\xff" + content(4)["model/weights.bin"][1:])


def _replace(store: Store, key: str, data: bytes) -> None:
    store.files.delete(key)
    store.files.write(key, data)


@dataclass
class Expected:
    """Place -> the values that it may show now."""

    values: dict[str, frozenset[Value]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Expected:
        """Just what is seen now."""
        return cls({place: frozenset([read(store)]) for place, read in PLACES.items()})

    def now(self, place: str) -> Value:
        """The one value that a place shows while nothing goes on."""
        [value] = self.values[place]
        return value

    def see(self, store: Store, place: str) -> None:
        """From here on what a place shows now, whatever it might have shown."""
        self.values = {**self.values, place: frozenset([PLACES[place](store)])}

    def begin(self, operation: Operation) -> None:
        """From here on the old value or what comes on the way to the new one."""
        passed = operation.through(self.now(operation.place))
        self.values = {**self.values, operation.place: self.values[operation.place] | frozenset(passed)}

    def end(self, operation: Operation, before: Value) -> None:
        """From here on the new value, which is acknowledged."""
        self.values = {**self.values, operation.place: frozenset([operation.through(before)[-1]])}

    def problems(self, store: Store, places: Iterable[str] = PLACES) -> list[str]:
        """What is seen and may not be."""
        found = []
        for place in places:
            value = PLACES[place](store)
            if value not in self.values[place]:
                found.append(f"{place} is {value}, expected {sorted(map(str, self.values[place]))}")
        return found


def perform(
    bench: Bench,
    operations: Iterable[Operation],
    expected: Expected,
    mark: Callable[[Mapping[str, frozenset[Value]]], None] = lambda values: None,
) -> None:
    """The operations, one after the other; `mark` is told of every change of what may be seen."""
    for operation in operations:
        before = expected.now(operation.place)
        expected.begin(operation)
        mark(expected.values)
        operation.act(bench, before)
        expected.end(operation, before)
        mark(expected.values)
