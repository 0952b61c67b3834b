"""Eight processes store artifacts at once, half of them the same ones, while others read and rehash what they see and
one collects garbage: what is acknowledged is there, what is seen is right."""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from artifacts import Artifact, Record, Store, open_store
from artifacts.errors import MissingError
from artifacts.materialize import problems_of
from artifacts.retention import HOUR, Policy
from artifacts.survey import survey
from artifacts.sweep import sweep
from tests.campaigns.outcome import Outcome
from tests.campaigns.s3 import s3_server

FINGERPRINT = "ab" * 32
WRITERS = 8
READERS = 2
GRACE_SECONDS = 60.0
"""Of the collector beside: a writer is never that slow between an acknowledgement and the name that it gives."""
LOOKED_AT = 100
"""Artifacts that a reader rehashes before it lists again."""


def content(writer: int, number: int) -> dict[str, bytes]:
    """Every second one is the same for all writers."""
    who = 255 if number % 2 else writer
    return {"a.bin": bytes([who, number % 256, number // 256]) * 7000, "sub/b.bin": b"z" * 1000}


def write(url: str, jobs: Path, writer: int, count: int) -> list[str]:
    """Stores and records; gives what was wrong. One in three gets a name, which keeps it from the collector."""
    store, wrong = open_store(url), []
    for number in range(count):
        folder = jobs / f"{writer}-{number}"
        for path, data in content(writer, number).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        artifact = store.put("model", folder, producer={"writer": writer})
        if number % 3 == 0:
            store.set_alias(f"writer{writer}/{number}", artifact)
        store.append_record(Record("sft", FINGERPRINT, {"writer": writer, "number": number}, {"model": artifact}))
        if number % 3 == 0 and store.verify(artifact):
            wrong.append(f"writer {writer}: artifact {number} was acknowledged and is not right")
    return wrong


def read(url: str, stop: Any, seed: int) -> list[str]:
    """Rehashes what can be seen until told to stop; gives what was wrong."""
    store, chosen, wrong = open_store(url), random.Random(seed), []
    while not stop.is_set():
        artifacts = store.newest_first()
        for artifact in chosen.sample(artifacts, min(LOOKED_AT, len(artifacts))):
            wrong += seen_wrong(store, artifact)
    return wrong


def seen_wrong(store: Store, artifact: Artifact) -> list[str]:
    """What of an artifact is seen and not right; one that is not there, or goes meanwhile, is not seen."""
    try:
        problems = problems_of(store.files, artifact.key, "files", store.manifest(artifact).files)
    except MissingError:
        return []
    if problems and not store.files.tree(f"{artifact.key}/files"):
        return []  # deleted between the two looks
    return [f"{artifact}: {problem}" for problem in problems if store.is_intact(artifact)]


def collect(url: str, stop: Any) -> list[str]:
    """Deletes what has no name, again and again."""
    store = open_store(url)
    while not stop.wait(1.0):
        sweep(store, survey(store, Policy(0, 0, GRACE_SECONDS / HOUR, 0)), "collector")
    return []


def race(url: str, jobs: Path, count: int, seed: int, collecting: bool) -> list[str]:
    """The anomalies of one race on a fresh store."""
    open_store(url)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    wrong: list[str] = []
    with _children(context, stop) as start:
        beside = [start(partial(read, url, stop, seed + reader)) for reader in range(READERS)]
        beside += [start(partial(collect, url, stop))] if collecting else []
        writers = [start(partial(write, url, jobs, writer, count)) for writer in range(WRITERS)]
        for answer in writers:
            wrong += answer()
        stop.set()
        for answer in beside:
            wrong += answer()
    return wrong + at_the_end(open_store(url), count, collecting)


def at_the_end(store: Store, count: int, collecting: bool) -> list[str]:
    """The records are those that were acknowledged, every name leads to what it was given for, nothing is left over."""
    wrong = []
    records = store.records("sft", FINGERPRINT)
    done = {(record.identity["writer"], record.identity["number"]) for record in records}
    if len(records) != WRITERS * count or done != {(w, n) for w in range(WRITERS) for n in range(count)}:
        wrong.append(f"{len(records)} records of {WRITERS * count} that were acknowledged")
    names = store.aliases()
    if set(names) != {f"writer{w}/{n}" for w in range(WRITERS) for n in range(0, count, 3)}:
        wrong.append(f"{len(names)} names, others than were given")
    expected = set(names.values()) if collecting else {record.outputs["model"] for record in records}
    there = set(store.artifacts())
    if not expected <= there or (not collecting and expected != there):
        wrong.append(f"{len(there)} artifacts, {len(expected - there)} of those that were acknowledged are gone")
    for artifact in there:
        wrong += seen_wrong(store, artifact)
    for name in ("tmp", "claims", "gc"):
        wrong += [f"{name}/{left} is left" for left in store.files.tree(name)]
    return wrong


@contextmanager
def _children(context: Any, stop: Any) -> Iterator[Any]:
    """`start(function)` runs it in a process of its own and gives what waits for its answer."""
    processes = []

    def start(function: Any) -> Any:
        mine, theirs = context.Pipe()
        process = context.Process(target=_answer, args=(function, theirs))
        process.start()
        theirs.close()
        processes.append(process)

        def wait() -> list[str]:
            try:
                found: list[str] = mine.recv()
            except EOFError:
                found = ["a process died"]
            process.join()
            return found

        return wait

    try:
        yield start
    finally:
        stop.set()
        for process in processes:
            process.join(60)
            process.kill()


def _answer(function: Any, pipe: Any) -> None:
    try:
        pipe.send(function())
    except BaseException:
        pipe.send([traceback.format_exc()])


def campaign(count: int, seed: int) -> Outcome:
    """On a local store, with a collector beside and without."""
    outcome = Outcome(seed)
    for collecting in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found = race(f"{folder}/store", Path(folder) / "store/scratch", count, seed, collecting)
        outcome.anomalies += found
        outcome.counts["artifacts stored"] += WRITERS * count
    return outcome


def s3_campaign(count: int, seed: int) -> Outcome:
    """On a real S3 server, without a collector."""
    with s3_server("races"), tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, {"POSTTRAIN_CACHE": f"{folder}/cache"}):
            found = race("s3://races/store", Path(folder) / "jobs", count, seed, collecting=False)
    outcome = Outcome(seed, anomalies=found)
    outcome.counts["artifacts stored on S3"] = WRITERS * count
    return outcome
