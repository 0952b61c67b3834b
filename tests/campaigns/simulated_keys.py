"""What a simulated store holds, key by key: how a key is read, and how it changes.

Read through the store's own functions, contents included: a key shows one value, and a change says through which
values its keys pass, the last of which stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from artifacts import Artifact, MissingError, Record, RequestError, Store, StoreError, aliases, digest_of, sha256_bytes
from artifacts.digest import FileEntry
from artifacts.retention import Policy
from artifacts.survey import survey
from artifacts.sweep import sweep

Value = Hashable
Key = tuple[str, int]
Now = Mapping[Key, Value]
MOST = 12
"""Records of a fingerprint, shards and steps before they are cleared."""
POLICY = Policy(keep_runs=0, keep_days=30, grace_hours=0)


@dataclass(frozen=True)
class Change:
    """`act(store, folder for what goes in)`; `passes`: key -> the values that it may show on the way, the last at the
    end; `calls`: as many as it makes to its file system, about."""

    name: str
    act: Callable[[Store, Path], object]
    passes: Mapping[Key, tuple[Value, ...]]
    calls: int = 25


@dataclass(frozen=True)
class Kind:
    """`change` gives None where there is nothing to change."""

    keys: int
    weight: int
    empty: Value
    read: Callable[[Store, int], Value]
    change: Callable[[Now, int, random.Random], Change | None]


# artifacts


def content(number: int) -> dict[str, bytes]:
    """The files of an artifact; every fourth one has two."""
    files = {"weights": number.to_bytes(4, "big") * 100}
    return files if number % 4 else {"sub/config.json": b"{}", **files}


def artifact(number: int) -> Artifact:
    """What the store calls it."""
    entries = (FileEntry(path, len(data), sha256_bytes(data)) for path, data in content(number).items())
    return Artifact("model", digest_of(entries))


ARTIFACTS = 200
NAMES = {artifact(number).digest: number for number in range(ARTIFACTS)}


def _read_artifact(store: Store, number: int) -> Value:
    """Every byte, in place or, of every eighth one, in a folder of the cache."""
    try:
        if number % 8:
            problems = store.verify(artifact(number))
            store.manifest(artifact(number))
            return problems[0] if problems else "whole"
        folder = store.materialize(artifact(number))
    except MissingError:
        return "absent"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return "whole" if found == content(number) else f"holds {sorted(found)}"


def _put(now: Now, number: int, draws: random.Random) -> Change:
    def act(store: Store, folder: Path) -> None:
        files = content(number)
        made = folder / f"of {len(files)} files"
        for path, data in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_bytes(data)
        store.put("model", made, producer={"stage": "sft"})

    return Change("put", act, {("artifact", number): ("whole",)})


def collected(now: Now) -> Change:
    """What has no name goes."""
    named = {value for (kind, _), value in now.items() if kind == "alias"}
    passes: dict[Key, tuple[Value, ...]] = {
        ("artifact", number): (now["artifact", number] if number in named else "absent",) for number in range(ARTIFACTS)
    }
    return Change("collect", lambda store, _: sweep(store, survey(store, POLICY), "gc"), passes, calls=800)


# names, records, runs


def _read_alias(store: Store, number: int) -> Value:
    found = aliases.read(store.files, f"team/{number}")
    return None if found is None else NAMES[found.digest]


def _name(now: Now, number: int, draws: random.Random) -> Change | None:
    there = [other for other in range(ARTIFACTS) if now["artifact", other] == "whole"]
    if not there:
        return None
    chosen = draws.choice(there)
    return Change(
        "name", lambda store, _: store.set_alias(f"team/{number}", artifact(chosen)), {("alias", number): (chosen,)}
    )


def _fingerprint(what: str, number: int) -> str:
    return sha256_bytes(f"{what} {number}".encode())


def _read_records(store: Store, number: int) -> Value:
    return tuple(sorted(one.provenance["tag"] for one in store.records("sft", _fingerprint("record", number))))


def _record(now: Now, number: int, draws: random.Random) -> Change | None:
    tags = now["record", number]
    assert isinstance(tags, tuple)
    if len(tags) >= MOST:
        return None
    record = Record("sft", _fingerprint("record", number), outputs={}, provenance={"tag": len(tags)})
    return Change("record", lambda store, _: store.append_record(record), {("record", number): ((*tags, len(tags)),)})


def _read_run(store: Store, number: int) -> Value:
    try:
        return int(store.read_run(f"run-{number}")["n"])
    except RequestError:
        return 0


def _write_run(now: Now, number: int, draws: random.Random) -> Change:
    following = _following(now["run", number])
    return Change(
        "write a run",
        lambda store, _: store.write_run(f"run-{number}", {"n": following}),
        {("run", number): (following,)},
    )


# work in progress


def _read_checkpoint(store: Store, number: int) -> Value:
    found = store.checkpoints(_fingerprint("work", number), keep=1).latest()
    if found is None:
        return 0
    step, folder = found
    return step if (folder / "state").read_bytes() == _state(number, step) else f"another state of step {step}"


def _state(number: int, step: int) -> bytes:
    return b"%d %d" % (number, step) * 50


def _save(now: Now, number: int, draws: random.Random) -> Change:
    key, step = ("checkpoint", number), now["checkpoint", number]
    assert isinstance(step, int)
    if step >= MOST:
        # older ones whose deletion was broken off may show once more
        down = tuple(range(step, -1, -1))
        return Change("clear", lambda store, _: store.checkpoints(_fingerprint("work", number)).clear(), {key: down})

    def act(store: Store, folder: Path) -> None:
        made = folder / "checkpoint"
        made.mkdir(parents=True, exist_ok=True)
        (made / "state").write_bytes(_state(number, step + 1))
        store.checkpoints(_fingerprint("work", number), keep=1).save(step + 1, made)

    return Change("checkpoint", act, {key: (step + 1,)})


def _read_shard(store: Store, number: int) -> Value:
    try:
        data = store.shards(_fingerprint("work", number)).load("piece")
    except MissingError:
        return "absent"
    return "whole" if data == _state(number, 0) else "another shard"


def _shard(now: Now, number: int, draws: random.Random) -> Change:
    key = ("shard", number)
    shards = _fingerprint("work", number)
    if now[key] == "whole":
        return Change("clear shards", lambda store, _: store.shards(shards).clear(), {key: ("absent",)})
    return Change("shard", lambda store, _: store.shards(shards).save("piece", _state(number, 0)), {key: ("whole",)})


def _read_lease(store: Store, number: int) -> Value:
    """The killed holders are known to be dead, so nobody is kept out."""
    return (store.lease(_fingerprint("work", number), "me").holder() or {}).get("owner", "free")


def _lease(now: Now, number: int, draws: random.Random) -> Change:
    def act(store: Store, _: Path) -> None:
        lease = store.lease(_fingerprint("work", number), "me")
        if not (lease.acquire() and lease.renew()):
            raise StoreError("the lease is not there")
        lease.release()

    return Change("lease", act, {("lease", number): ("free",)})


def _following(value: Value) -> int:
    assert isinstance(value, int)
    return value + 1


KINDS = {
    "artifact": Kind(ARTIFACTS, 6, "absent", _read_artifact, _put),
    "alias": Kind(40, 4, None, _read_alias, _name),
    "record": Kind(60, 5, (), _read_records, _record),
    "run": Kind(20, 2, 0, _read_run, _write_run),
    "checkpoint": Kind(30, 4, 0, _read_checkpoint, _save),
    "shard": Kind(30, 4, "absent", _read_shard, _shard),
    "lease": Kind(30, 2, "free", _read_lease, _lease),
}
