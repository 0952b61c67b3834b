"""Several writers and readers at once: what is acknowledged is visible, what is visible is right."""

import gc
import os
import sys
import threading
import time

from artifacts import Record, Store, open_store
from artifacts.materialize import problems_of

FINGERPRINT = "ab" * 32
WRITERS, ROUNDS = 8, 12


def content(writer: int, round_: int) -> dict[str, bytes]:
    """Half of the artifacts are written by all at once, the others by one."""
    who = 0 if round_ % 2 else writer
    return {"a.bin": bytes([who, round_]) * 20000, "sub/b.bin": b"z" * 1000}


def write(store: Store, folder, writer: int, rounds: int) -> None:
    for round_ in range(rounds):
        job = folder / f"{writer}-{round_}"
        for path, data in content(writer, round_).items():
            (job / path).parent.mkdir(parents=True, exist_ok=True)
            (job / path).write_bytes(data)
        artifact = store.put("model", job, producer={"writer": writer})
        assert store.verify(artifact) == []
        store.append_record(Record("sft", FINGERPRINT, {"writer": writer, "round": round_}, {"model": artifact}))


def wrong(store: Store) -> list[str]:
    """Rehashes everything that is visible."""
    record = store.lookup("sft", FINGERPRINT)
    artifacts = list(store.artifacts()) + ([] if record is None else list(record.outputs.values()))
    return [
        problem
        for artifact in artifacts
        for problem in problems_of(store.files, artifact.key, "files", store.manifest(artifact).files)
    ]


def check_the_end(store: Store, writers: int, rounds: int) -> None:
    records = store.records("sft", FINGERPRINT)
    done = {(record.identity["writer"], record.identity["round"]) for record in records}
    assert done == {(writer, round_) for writer in range(writers) for round_ in range(rounds)}
    assert len(records) == writers * rounds and wrong(store) == []
    shared = rounds // 2
    assert len(list(store.artifacts())) == shared + writers * (rounds - shared)


def test_eight_processes_and_a_reader_that_rehashes(tmp_path):
    url = str(tmp_path / "store")
    store = open_store(url)
    children = []
    for writer in range(WRITERS):
        child = os.fork()
        if child == 0:
            try:
                write(open_store(url), store.scratch, writer, ROUNDS)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses, reads = [], 0
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            children.remove(child)
            statuses.append(status)
        assert wrong(store) == []
        reads += 1
    assert statuses == [0] * WRITERS and reads > 3
    check_the_end(store, WRITERS, ROUNDS)
    assert list((tmp_path / "store/tmp").iterdir()) == []


def race_threads(url: str, folder, writers: int, rounds: int) -> list[object]:
    """What failed or was seen wrong while the writers wrote."""
    failures: list[object] = []
    running = True

    def writer(index: int) -> None:
        try:
            write(open_store(url), folder, index, rounds)
        except BaseException as error:
            failures.append(error)

    def reader() -> None:
        store = open_store(url)
        while running:
            failures.extend(wrong(store))
            time.sleep(0.05)

    threads = [threading.Thread(target=writer, args=(index,)) for index in range(writers)]
    watching = threading.Thread(target=reader)
    for thread in (watching, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    running = False
    watching.join()
    return failures


def test_writers_on_s3(bucket, tmp_path):
    url = f"{bucket}/{tmp_path.name}"
    assert race_threads(url, tmp_path / "jobs", writers=3, rounds=2) == []
    check_the_end(open_store(url), writers=3, rounds=2)


def test_writers_in_memory(tmp_path):
    url = f"memory://{tmp_path.name}"
    assert race_threads(url, tmp_path / "jobs", writers=8, rounds=4) == []
    check_the_end(open_store(url), writers=8, rounds=4)


def test_a_file_that_is_written_while_memory_is_listed(tmp_path):
    """The collector may run amid fsspec's copy of its dictionary, and give way to another thread there."""
    files = open_store(f"memory://{tmp_path.name}").files
    for index in range(8):
        files.write(f"there/{index}", b"x")
    writers: list[threading.Thread] = []

    def write_meanwhile(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and len(writers) < 4 and sys._getframe(1).f_code.co_name == "find":
            key = files.path(f"there/new{len(writers)}")
            writers.append(threading.Thread(target=files.fs.pipe_file, args=(key, b"y")))
            writers[-1].start()
            writers[-1].join(0.1)

    thresholds = gc.get_threshold()
    gc.callbacks.append(write_meanwhile)
    try:
        gc.set_threshold(1)
        names = sorted(files.fs.find(files.path("there")))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(write_meanwhile)
    assert [name.rpartition("/")[2] for name in names] == [str(index) for index in range(8)]
    for index, writer in enumerate(writers):
        writer.join()
        assert files.read(f"there/new{index}") == b"y"
    assert writers
