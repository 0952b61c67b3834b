"""A process that dies between any two calls to its store leaves all or nothing, and the next one clears up and
finishes. In full, on S3 as well: `python -m tests.campaigns store_kills`."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from artifacts import Record, Store, open_store
from artifacts.disk import UNSYNCED
from artifacts.files import Publication
from artifacts.local import LocalFiles
from artifacts.manifest import library_versions
from artifacts.materialize import problems_of
from tests.artifacts.dying import DIED, DyingDisk, in_child
from tests.campaigns.store_kills import Local, Memory, every_kill

FINGERPRINT = "ab" * 32
CONTENT = {"config.json": b"{}", "model/weights.bin": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def _without_fsync(monkeypatch):
    """A process that dies takes no page cache along; test_power_loss is about that."""
    monkeypatch.setenv(UNSYNCED, "1")
    # asked once here instead of in every child
    library_versions()


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", [Local, Memory])
def test_every_operation_killed_at_every_call(kind, tmp_path):
    """From a process without torch: to fork this one takes longer than what the child does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as small:
        outcome = small.submit(every_kill, kind, tmp_path, 1).result()
    assert outcome.anomalies == [] and outcome.counts["kills"] > (400 if kind is Local else 300)
    # before step k+1 is after step k, and every operation leaves its rubbish for the next one that opens the store
    assert kind is Memory or list((tmp_path / "store/tmp").iterdir()) == []


def put_and_record(root: Path, files: LocalFiles) -> None:
    store, folder = Store(files, root / "cache"), root / "scratch/job"
    for path, data in CONTENT.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    artifact = store.put("model", folder, producer={})
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}))


def anomalies(root: Path) -> list[str]:
    """What a reader sees that is not all or nothing."""
    store = open_store(str(root))
    wrong = (
        problems_of(store.files, artifact.key, "files", store.manifest(artifact).files) and store.is_intact(artifact)
        for artifact in store.artifacts()
    )
    return ["visible and wrong" for each in wrong if each]


class MarkerFirst(LocalFiles):
    """A protocol that announces files before they are there, and fills them in where they are seen."""

    def publish(self, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        for entry in publication.entries:
            self.write(f"{publication.key}/{publication.place(entry)}", bytes(entry.size))
            self.write(f"{publication.key}/{publication.place(entry)}", (publication.folder / entry.path).read_bytes())


def test_a_protocol_that_announces_first_is_caught(tmp_path):
    found = []
    for last in range(1, 200):
        root = tmp_path / f"{last}"
        status = in_child(lambda root=root, last=last: put_and_record(root, MarkerFirst(root, DyingDisk(last, False))))
        if status != DIED:
            break
        found += anomalies(root)
    assert found
