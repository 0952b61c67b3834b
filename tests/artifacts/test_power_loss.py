"""No power cut, at any step and whatever the disk had kept of what was not synced, leaves something that is seen
and wrong, or loses something that was acknowledged."""

import logging
from pathlib import Path

import pytest

from artifacts import Artifact, Record, Store
from artifacts.files import Publication
from artifacts.local import LocalFiles
from artifacts.materialize import problems_of
from tests.artifacts.snapshot import RecordingDisk, SnapshotFiles, states, without

FINGERPRINT = "ab" * 32
CONTENT = {"config.json": b"{}", "model/weights.bin": bytes(range(256)) * 40, "empty": b""}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def job(disk: RecordingDisk, root: Path, name: str, files: dict[str, bytes], synced: bool = False) -> Path:
    """A folder as a stage leaves it: nothing synced."""
    folder = root / "scratch" / name
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    disk.adopt(root / "scratch", synced)
    return folder


def store_on(root: Path, files: type[LocalFiles] = LocalFiles) -> tuple[RecordingDisk, Store]:
    root.mkdir()
    disk = RecordingDisk(root)
    return disk, Store(files(root, disk), root.parent / "cache")


def reader(content: dict[str, bytes]) -> Store:
    return Store(SnapshotFiles(content), Path("unused"))


def artifact_wrong(store: Store, artifact: Artifact, promised: bool) -> str | None:
    if not store.is_intact(artifact):
        return "acknowledged and lost" if promised else None
    if problems_of(store.files, artifact.key, "files", store.manifest(artifact).files):
        return "visible and wrong"
    return None


def put_and_record(root: Path, files: type[LocalFiles] = LocalFiles):
    disk, store = store_on(root, files)
    folder = job(disk, root, "job", CONTENT)
    artifact = store.put("model", folder, producer={"stage": "sft"})
    expected = store.manifest(artifact).files
    disk.mark("put")
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}))
    disk.mark("record")

    def check(promised: set[str], content: dict[str, bytes]) -> str | None:
        after = reader(content)
        announced = f"{artifact.key}/manifest.json" in content
        if announced and problems_of(after.files, artifact.key, "files", expected):
            return "announced and not there"
        wrong = artifact_wrong(after, artifact, "put" in promised)
        if wrong is None and "record" in promised and after.lookup("sft", FINGERPRINT) is None:
            return "record lost"
        return wrong

    return disk.steps, check


def put_over_damage(root: Path):
    """The first copy lost a file and has a flipped bit, and that was noticed; the stage ran again."""
    disk, store = store_on(root)
    artifact = store.put("model", job(disk, root, "first", CONTENT), producer={})
    payload = root / artifact.key / "files"
    (payload / "empty").unlink()
    weights = payload / "model/weights.bin"
    weights.chmod(0o644)
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    (root / artifact.key / "damaged.json").write_bytes(b"{}")
    disk.steps.clear()
    disk.__init__(root)  # the state from here on: everything that lies there is on the disk
    disk.adopt(root, synced=True)
    again = store.put("model", job(disk, root, "second", CONTENT), producer={})
    assert again == artifact
    disk.mark("put")

    def check(promised: set[str], content: dict[str, bytes]) -> str | None:
        return artifact_wrong(reader(content), artifact, "put" in promised)

    return disk.steps, check


def two_checkpoints(root: Path, files: type[LocalFiles] = LocalFiles):
    disk, store = store_on(root, files)
    checkpoints = store.checkpoints(FINGERPRINT, keep=1)
    for step in (5, 10):
        state = {"state.json": b"%d" % step, "weights": bytes([step]) * 9000}
        checkpoints.save(step, job(disk, root, f"step{step}", state))
        disk.mark(str(step))

    def check(promised: set[str], content: dict[str, bytes]) -> str | None:
        after = reader(content).checkpoints(FINGERPRINT)
        for path in content:
            if path.startswith("work/") and path.endswith("/DONE.json"):
                saved = int(path.split("/")[-2][:10])
                if content.get(path.replace("DONE.json", "weights")) != bytes([saved]) * 9000:
                    return "announced and not there"
        step = after.latest_step()
        if step is None:
            return "acknowledged and lost" if promised else None
        if step < max(map(int, promised), default=0):
            return "an older one than acknowledged"
        [name] = [name for name in after._names() if int(name[:10]) == step]
        folder = f"work/{FINGERPRINT}/checkpoints/{name}"
        whole = content[f"{folder}/weights"] == bytes([step]) * 9000
        return None if whole and content[f"{folder}/state.json"] == b"%d" % step else "visible and wrong"

    return disk.steps, check


def checkpoints_in_parts(root: Path):
    """Two processes save their shares, and one of them makes the checkpoint count."""
    disk, store = store_on(root)
    checkpoints = store.checkpoints(FINGERPRINT, keep=1)
    for step in (5, 10):
        name = checkpoints.new_name(step)
        for part in (0, 1):
            checkpoints.save_part(name, part, job(disk, root, f"{step}-{part}", {"weights": bytes([step + part]) * 99}))
        checkpoints.finish(name, 2)
        disk.mark(str(step))

    def check(promised: set[str], content: dict[str, bytes]) -> str | None:
        after = reader(content).checkpoints(FINGERPRINT)
        for path in content:
            if path.startswith("work/") and path.endswith("/DONE.json"):
                saved, folder = int(path.split("/")[-2][:10]), path.removesuffix("/DONE.json")
                for part in (0, 1):
                    if content.get(f"{folder}/part-0000{part}/weights") != bytes([saved + part]) * 99:
                        return "announced and not there"
        step = after.latest_step()
        if step is None:
            return "acknowledged and lost" if promised else None
        return "an older one than acknowledged" if step < max(map(int, promised), default=0) else None

    return disk.steps, check


def alias_replaced(root: Path):
    disk, store = store_on(root)
    targets = [store.put("model", job(disk, root, str(i), {"a": b"%d" % i}), producer={}) for i in (0, 1)]
    disk.mark("put")
    for index, artifact in enumerate(targets):
        store.set_alias("team/best", artifact)
        disk.mark(f"alias {index}")

    def check(promised: set[str], content: dict[str, bytes]) -> str | None:
        now = reader(content).aliases().get("team/best")
        if "alias 1" in promised:
            return None if now == targets[1] else "acknowledged and lost"
        if "alias 0" in promised:
            return None if now in targets else "neither old nor new"
        return None if now in (None, targets[0]) else "from nowhere"

    return disk.steps, check


PROTOCOLS = [put_and_record, put_over_damage, two_checkpoints, checkpoints_in_parts, alias_replaced]


def wrongs(steps, check, samples: int, enough: int = 10**9, seed: int = 1) -> tuple[int, list[str]]:
    """How many states were looked at, and what was wrong in them, until `enough` was found."""
    count, found = 0, []
    verdicts: dict[object, str | None] = {}
    for promised, content in states(steps, samples, seed):
        count += 1
        same = (frozenset(promised), frozenset(content.items()))
        if same not in verdicts:
            verdicts[same] = check(promised, content)
        wrong = verdicts[same]
        if wrong is not None:
            found.append(wrong)
        if len(found) >= enough:
            break
    return count, found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_state_is_wrong_or_lost(protocol, tmp_path):
    steps, check = protocol(tmp_path / "store")
    count, found = wrongs(steps, check, samples=200)
    assert not found, (count, found[:5])
    assert count > 5000


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mutant", [without("fsync"), without("fsync_folder"), without("fsync", "fsync_folder")])
def test_forgotten_syncs_are_found(protocol, mutant, tmp_path):
    steps, check = protocol(tmp_path / "store")
    assert wrongs(mutant(steps), check, samples=20, enough=1)[1]


class MarkerFirst(LocalFiles):
    """A protocol that announces files before they are there."""

    def publish(self, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        super().publish(publication)


@pytest.mark.parametrize("protocol", [put_and_record, two_checkpoints])
def test_a_marker_that_comes_first_is_found(protocol, tmp_path):
    steps, check = protocol(tmp_path / "store", MarkerFirst)
    assert wrongs(steps, check, samples=0, enough=1)[1] == ["announced and not there"]
