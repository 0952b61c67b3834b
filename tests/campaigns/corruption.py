"""Damage of every kind in a store: any byte of what is sealed, bits and tails of contents, files cut, missing, longer,
in each other's place, folders under another name. All of it is found before anything is used, and named; the stage
that made it runs again; and what is right is never called damaged.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from artifacts import Artifact, DamagedError, MissingError, Record, RequestError, Store, open_store
from artifacts.disk import UNSYNCED
from artifacts.leases import _parsed
from artifacts.manifest import library_versions
from flows.recipe import Recipe
from tests.campaigns.outcome import Outcome
from tests.campaigns.small_recipe import attempt, installed

FINGERPRINT = "ab" * 32
BLOCK = 4096
CLEAN_READS = 10_000
FILES = {"weights.bin": bytes(range(256)) * 80, "twin": bytes(range(1, 256)) + bytes(255), "sub/config.json": b"{}"}
FILES["other"] = FILES["twin"][::-1]


@dataclass
class Sealed:
    """A small file that says itself whether it is whole; `counts`: whether a reader still believes it."""

    key: str
    counts: Callable[[], bool]


class Bench:
    """A store with one of everything in it."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.artifact = store.put("model", self.fill(FILES), producer={"stage": "sft"}, metrics={"loss": 0.25})
        store.append_record(Record("sft", FINGERPRINT, outputs={"model": self.artifact}, metrics={"loss": 0.25}))
        checkpoints = store.checkpoints(FINGERPRINT)
        checkpoints.save(1, self.fill({"state": b"one" * 3000}))
        name = checkpoints.new_name(2)
        for part in (0, 1):
            checkpoints.save_part(name, part, self.fill({"state": b"%d" % part * 9000}))
        checkpoints.finish(name, 2)
        self.saved = f"work/{FINGERPRINT}/checkpoints/{name}"
        store.shards(FINGERPRINT).save("piece", b"piece" * 999)
        store.set_alias("team/best", self.artifact)
        store.write_run("run", {"n": 1})
        store.claim("user", [self.artifact])
        assert store.lease(FINGERPRINT, "me").acquire()

    def fill(self, files: dict[str, bytes]) -> Path:
        folder = self.folder / f"{random.getrandbits(60):x}"
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    def sealed(self) -> list[Sealed]:
        store, artifact = self.store, self.artifact
        [record] = store.files.children(f"index/sft/{FINGERPRINT}")
        lease = f"work/{FINGERPRINT}/lease.json"
        return [
            Sealed(f"{artifact.key}/manifest.json", lambda: store.is_intact(artifact)),
            Sealed(f"index/sft/{FINGERPRINT}/{record}", lambda: store.lookup("sft", FINGERPRINT) is not None),
            Sealed(f"{self.saved}/DONE.json", lambda: store.checkpoints(FINGERPRINT).latest_step() == 2),
            Sealed(f"{self.saved}/part-00001/part.json", self._takes_newest),
            Sealed("aliases/team/best.json", lambda: store.aliases() == {"team/best": artifact}),
            Sealed("runs/run.json", lambda: _read(lambda: store.read_run("run")) == {"n": 1}),
            Sealed("claims/user.json", lambda: bool(_read(lambda: _claims(store)))),
            Sealed(lease, lambda: _parsed(store.files.read(lease)) is not None),
        ]

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint, fetched anew."""
        shutil.rmtree(self.store._cache / "work", ignore_errors=True)
        return self.store.checkpoints(FINGERPRINT).latest()

    def _takes_newest(self) -> bool:
        found = self.latest()
        return found is not None and found[0] == 2

    def payload(self) -> list[str]:
        return [f"{self.artifact.key}/files/{path}" for path in FILES]


def _read(read: Callable[[], object]) -> object:
    try:
        return read()
    except (DamagedError, RequestError):
        return None


def _claims(store: Store) -> object:
    from artifacts import claims

    return claims.read_all(store.files)


def every_byte(bench: Bench, outcome: Outcome, rng: random.Random, step: int = 1) -> None:
    """One bit of every byte of every sealed file, and every length that it may be cut to."""
    for sealed in bench.sealed():
        whole = bench.store.files.read(sealed.key)
        assert sealed.counts(), sealed.key
        for position in range(0, len(whole), step):
            flipped = whole[position] ^ (1 << rng.randrange(8))
            changes = (whole[:position] + bytes([flipped]) + whole[position + 1 :], whole[:position])
            for changed in changes:
                _replace(bench.store, sealed.key, changed)
                outcome.counts["bytes of sealed files"] += 1
                if sealed.counts():
                    outcome.anomalies.append(f"{sealed.key} is believed, changed at {position}")
        _replace(bench.store, sealed.key, whole)
        if not sealed.counts():
            outcome.anomalies.append(f"{sealed.key} is not believed again")


def damages(rng: random.Random, whole: bytes, flips: int) -> Iterator[tuple[str, bytes | None]]:
    """(what, the content then; None: no file)"""
    for _ in range(flips if whole else 0):
        position, data = rng.randrange(len(whole)), bytearray(whole)
        data[position] ^= 1 << rng.randrange(8)
        yield "bit flips", bytes(data)
    for length in range(0, len(whole), BLOCK):
        yield "cuts", whole[:length]
        if any(whole[length:]):
            yield "zeroed tails", whole[:length] + bytes(len(whole) - length)
    yield "appended bytes", whole + b"\0"
    yield "missing files", None


def contents(bench: Bench, outcome: Outcome, rng: random.Random, flips: int) -> None:
    """Damage of one file of an artifact at a time, found by `verify` and by whoever wants to use it."""
    for key in bench.payload():
        whole, name = bench.store.files.read(key), key.split("/files/")[1]
        for what, changed in damages(rng, whole, flips * len(whole) // sum(map(len, FILES.values())) + 1):
            _replace(bench.store, key, changed)
            outcome.counts[what] += 1
            outcome.anomalies += [f"{what} in {name}: {text}" for text in _unnoticed(bench.store, bench.artifact, name)]
            _replace(bench.store, key, whole)
            if bench.store.verify(bench.artifact):
                outcome.anomalies.append(f"{name} is called damaged after {what} were mended")


def _unnoticed(store: Store, artifact: Artifact, name: str) -> list[str]:
    found = []
    shutil.rmtree(store._cache / "artifacts", ignore_errors=True)
    try:
        store.materialize(artifact)
        found.append("used")
    except DamagedError as error:
        if name not in str(error):
            found.append(f"not named: {error}")
    if store.is_intact(artifact) or store.lookup("sft", FINGERPRINT) is not None:
        found.append("counts after it was found")
    if not any(name in problem for problem in store.verify(artifact)):
        found.append("not found by verify")
    return found


def places(bench: Bench, outcome: Outcome) -> None:
    """Files in each other's place, and a folder under the name of another artifact."""
    store, artifact = bench.store, bench.artifact
    one, two = (f"{artifact.key}/files/{name}" for name in ("twin", "other"))
    first, second = store.files.read(one), store.files.read(two)
    for left, right in ((second, first), (first, first), (second, second)):
        _replace(store, one, left)
        _replace(store, two, right)
        outcome.counts["swapped files"] += 1
        if not store.verify(artifact) or store.is_intact(artifact):
            outcome.anomalies.append("swapped files are not found")
    _replace(store, one, first)
    _replace(store, two, second)
    store.verify(artifact)
    renamed = Artifact("model", "0" * 64)
    for path in store.files.tree(artifact.key):
        store.files.write(f"{renamed.key}/{path}", store.files.read(f"{artifact.key}/{path}"))
    outcome.counts["renamed folders"] += 1
    with contextlib.suppress(DamagedError):
        store.materialize(renamed)
        outcome.anomalies.append("a folder under another name is used")
    store.files.remove(renamed.key)


def work(bench: Bench, outcome: Outcome, rng: random.Random, flips: int) -> None:
    """Damage of checkpoints and shards: an older checkpoint is taken, the shard is made again."""
    key = f"{bench.saved}/part-00000/state"
    whole = bench.store.files.read(key)
    for what, changed in damages(rng, whole, flips):
        _replace(bench.store, key, changed)
        outcome.counts[f"{what} in checkpoints"] += 1
        found = bench.latest()
        if found is None or found[0] != 1 or (found[1] / "state").read_bytes() != b"one" * 3000:
            outcome.anomalies.append(f"{what}: a damaged checkpoint is taken")
        _replace(bench.store, key, whole)
    [shard] = bench.store.files.children(f"work/{FINGERPRINT}/shards")
    key = f"work/{FINGERPRINT}/shards/{shard}"
    whole = bench.store.files.read(key)
    for what, changed in damages(rng, whole, flips):
        _replace(bench.store, key, changed)
        outcome.counts[f"{what} in shards"] += 1
        with contextlib.suppress(DamagedError, MissingError):
            bench.store.shards(FINGERPRINT).load("piece")
            outcome.anomalies.append(f"{what}: a damaged shard is taken")
        _replace(bench.store, key, whole)


def clean_reads(bench: Bench, outcome: Outcome, count: int) -> None:
    """Everything is read again and again, and nothing is wrong with it."""
    store, reads = bench.store, 0
    while reads < count:
        alarms = [sealed.key for sealed in bench.sealed() if not sealed.counts()]
        alarms += store.verify(bench.artifact)
        store.materialize(bench.artifact)
        store.shards(FINGERPRINT).load("piece")
        reads += len(bench.sealed()) + 3
        outcome.anomalies += [f"false alarm: {alarm}" for alarm in alarms]
    outcome.counts["clean reads"] += reads


def reruns(recipe: Recipe, folder: Path, outcome: Outcome, rng: random.Random) -> None:
    """A stage whose output is damaged runs again, at the latest in the run after the one that found it."""
    store = open_store(str(folder / "store"))
    expected = attempt(recipe, store)
    assert expected.well, expected.errors
    model = Artifact("model", expected.outputs["model"].removeprefix("sha256:"))
    key = f"{model.key}/files/weights"
    whole = store.files.read(key)
    for what, changed in damages(rng, whole, 5):
        _replace(store, key, changed)
        store.files.remove("index/score")  # so that the model is needed
        first = attempt(recipe, store)
        last = first if first.well else attempt(recipe, store)
        outcome.counts["reruns"] += 1
        if not first.well and not all("weights" in error and "run" in error for error in first.errors):
            outcome.anomalies.append(f"{what}: not named: {first.errors}")
        if last.outputs != expected.outputs or store.files.read(key) != whole:
            outcome.anomalies.append(f"{what}: not mended: {last.errors or last.outputs}")


def _replace(store: Store, key: str, data: bytes | None) -> None:
    store.files.delete(key)
    if data is not None:
        store.files.write(key, data)


@contextlib.contextmanager
def benches() -> Iterator[list[Bench]]:
    """One on a local disk, one behind a remote file system."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        folder = Path(temporary)
        given = {UNSYNCED: "1", "POSTTRAIN_CACHE": str(folder / "cache")}
        with mock.patch.dict(os.environ, given):
            library_versions()
            yield [Bench(open_store(url), folder / "made") for url in (str(folder / "store"), f"memory:/{folder}")]


def campaign(count: int, seed: int, step: int = 1, reads: int = CLEAN_READS) -> Outcome:
    """`count` flipped bits in contents, every `step`th byte of what is sealed, everything else in full."""
    outcome, rng = Outcome(seed), random.Random(seed)
    with benches() as both:
        for bench in both:
            every_byte(bench, outcome, rng, step)
            contents(bench, outcome, rng, count // 2)
            places(bench, outcome)
            work(bench, outcome, rng, max(1, count // 40))
            clean_reads(bench, outcome, reads // 2)
        with installed() as recipe:
            reruns(recipe, both[0].folder, outcome, rng)
    return outcome
