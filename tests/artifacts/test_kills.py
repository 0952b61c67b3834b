"""A process that dies between any two steps leaves all or nothing, and the next one clears up and finishes."""

import os
import threading
from pathlib import Path

import pytest

from artifacts import Record, Store, open_store
from artifacts.disk import UNSYNCED, Disk
from artifacts.files import Publication
from artifacts.local import LocalFiles
from artifacts.manifest import library_versions
from artifacts.materialize import problems_of

FINGERPRINT = "ab" * 32
CONTENT = {"config.json": b"{}", "model/weights.bin": bytes(range(256)) * 40}
DIED = 9


@pytest.fixture(autouse=True)
def _without_fsync(monkeypatch):
    """A process that dies takes no page cache along; test_power_loss is about that."""
    monkeypatch.setenv(UNSYNCED, "1")
    # asked once here instead of in every child
    library_versions()


class DyingDisk(Disk):
    """Ends the process before or after its step number `last`."""

    def __init__(self, last: int, after: bool) -> None:
        self.count, self.last, self.after = 0, last, after
        self.lock = threading.Lock()


def _dying(name):
    step = getattr(Disk, name)

    def run(self, *arguments):
        with self.lock:
            self.count += 1
            mine = self.count
        if mine == self.last and not self.after:
            os._exit(DIED)
        try:
            return step(self, *arguments)
        finally:
            if mine == self.last and self.after:
                os._exit(DIED)

    return run


for _name in ("mkdir", "create", "write", "fsync", "rename", "unlink"):
    setattr(DyingDisk, _name, _dying(_name))


def job(root: Path, name: str) -> Path:
    folder = root / "scratch" / name
    for path, data in CONTENT.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def put_and_record(root: Path, files: LocalFiles) -> None:
    store = Store(files, root / "cache")
    artifact = store.put("model", job(root, str(os.getpid())), producer={})
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}))


def save_twice(root: Path, files: LocalFiles) -> None:
    for step in (1, 2):
        Store(files, root / "cache").checkpoints(FINGERPRINT, keep=1).save(step, job(root, f"{os.getpid()}-{step}"))


def save_then_in_parts(root: Path, files: LocalFiles) -> None:
    checkpoints = Store(files, root / "cache").checkpoints(FINGERPRINT, keep=1)
    checkpoints.save(1, job(root, f"{os.getpid()}-1"))
    name = checkpoints.new_name(2)
    for part in (0, 1):
        checkpoints.save_part(name, part, job(root, f"{os.getpid()}-2-{part}"))
    checkpoints.finish(name, 2)


def in_child(work) -> int:
    """Exit status of `work()` in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(tmp_path: Path, protocol, files: type[LocalFiles] = LocalFiles, prepare=lambda root: None):
    """The store after every kill, one fresh root each."""
    last = 1
    while True:
        for after in (False, True):
            root = tmp_path / f"{last}{after}"
            open_store(str(root))
            prepare(root)
            status = in_child(lambda root=root, k=last, after=after: protocol(root, files(root, DyingDisk(k, after))))
            if status == 0:
                return
            assert status == DIED
            yield root
        last += 1


def damage(root: Path) -> None:
    """A first copy with a cut file."""
    store = open_store(str(root))
    artifact = store.put("model", job(root, "first"), producer={})
    path = store.files.path(f"{artifact.key}/files/model/weights.bin")
    path.unlink()
    path.write_bytes(b"cut")


def anomalies(root: Path) -> list[str]:
    """What a reader sees that is not all or nothing."""
    store, found = open_store(str(root)), []
    for artifact in store.artifacts():
        problems = problems_of(store.files, artifact.key, "files", store.manifest(artifact).files)
        if problems and store.is_intact(artifact):
            found.append("visible and wrong")
    record = store.lookup("sft", FINGERPRINT)
    if record is not None and store.verify(record.outputs["model"]):
        found.append("recorded and wrong")
    if record is None and store.records("sft", FINGERPRINT):
        found.append("recorded and not there")
    return found


@pytest.mark.parametrize("prepare", [lambda root: None, damage], ids=["new", "over a damaged one"])
def test_put_and_record_at_every_step(tmp_path, prepare):
    count = 0
    for root in kills(tmp_path, put_and_record, prepare=prepare):
        count += 1
        assert anomalies(root) == []
        assert list((root / "tmp").iterdir()) == [], "what the dead one left is cleared away"
        if count % 2:
            # before step k+1 is after step k: one of the two goes on
            continue
        assert in_child(lambda root=root: put_and_record(root, LocalFiles(root))) == 0
        store = open_store(str(root))
        folder = store.materialize(store.lookup("sft", FINGERPRINT).outputs["model"])
        assert {path: (folder / path).read_bytes() for path in CONTENT} == CONTENT
    assert count > 40


@pytest.mark.parametrize("work", [save_twice, save_then_in_parts])
def test_checkpoints_at_every_step(tmp_path, work):
    count = 0
    seen = set()
    for root in kills(tmp_path, work):
        count += 1
        latest = open_store(str(root)).checkpoints(FINGERPRINT).latest()
        seen.add(None if latest is None else latest[0])
        if latest is not None:
            in_parts = latest[0] == 2 and work is save_then_in_parts
            for folder in ("part-00000", "part-00001") if in_parts else ("",):
                assert {path: (latest[1] / folder / path).read_bytes() for path in CONTENT} == CONTENT
        if count % 2:
            continue
        assert in_child(lambda root=root: work(root, LocalFiles(root))) == 0
        assert open_store(str(root)).checkpoints(FINGERPRINT).latest_step() == 2
    assert seen == {None, 1, 2} and count > 60


class MarkerFirst(LocalFiles):
    """A protocol that announces files before they are there, and fills them in where they are seen."""

    def publish(self, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        for entry in publication.entries:
            self.write(f"{publication.key}/{publication.place(entry)}", bytes(entry.size))
            self.write(f"{publication.key}/{publication.place(entry)}", (publication.folder / entry.path).read_bytes())


def test_a_protocol_that_announces_first_is_caught(tmp_path):
    assert any(anomalies(root) for root in kills(tmp_path, put_and_record, MarkerFirst))
