"""Eight flows race on one store, half of them for other stages beside the common ones, on a local disk and on S3: each
fingerprint is worked on once, or once more where its holder was killed or stood still for longer than its lease lives.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import flows.sharing
from artifacts import open_store
from flows.recipe import Recipe
from tests.campaigns.outcome import Outcome
from tests.campaigns.s3 import s3_server
from tests.campaigns.small_recipe import RECIPE, Attempt, attempt, installed
from tests.campaigns.storage_faults import unsound

FLOWS = 8
OTHERS = 4
"""How many different stages there are beside the common ones."""
WORK_SECONDS = 0.1
"""A stage works so long, at most."""
TTL_SECONDS = {"stopped": 5.0}
"""Of leases; else long enough for any machine."""
LONG_SECONDS = 600.0
WAYS = ("none",) * 7 + ("killed",) * 2 + ("stopped",)
"""What happens to one of the flows, race by race."""


@dataclass(frozen=True)
class Task:
    """What one flow does in one race. `log`: a file that gets a line "fingerprint number" for all that it works on."""

    url: str
    number: int
    size: int
    log: Path
    ttl_seconds: float


def race(task: Task) -> Attempt:
    """One flow's part, in its own process."""
    draws = random.Random(f"{task.number} {task.size}")

    def begun(fingerprint: str) -> None:
        with open(task.log, "a") as log:
            log.write(f"{fingerprint} {task.number}\n")
        time.sleep(draws.uniform(0, WORK_SECONDS))

    store = open_store(task.url)
    store.lease = partial(store.lease, ttl_seconds=task.ttl_seconds)  # type: ignore[method-assign]
    with installed(), mock.patch.object(flows.sharing, "LEASE_POLL_SECONDS", 0.05):
        return attempt(_recipe(task), store, begun)


def _recipe(task: Task) -> Recipe:
    own = {"uses": "rows", "with": {"size": 1000 * task.size + task.number % OTHERS}}
    common = {**RECIPE["stages"], "rows": {"uses": "rows", "with": {"size": task.size}}}
    return Recipe.from_dict({**RECIPE, "stages": {**common, "own": own}})


class Flows:
    """Eight processes that take part in one race after the other."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, "artifacts.s3", "s3fs"])
        self.members = [self._start() for _ in range(FLOWS)]

    def _start(self) -> tuple[Any, Any]:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
        process.start()
        theirs.close()
        return process, mine

    def race(self, tasks: list[Task], way: str, draws: random.Random) -> tuple[list[Attempt | str], int | None]:
        """What each flow did, an error in words, or "killed"; which one of them was struck."""
        for (_, pipe), task in zip(self.members, tasks, strict=True):
            pipe.send(task)
        victim = draws.randrange(FLOWS) if way != "none" else None
        if victim is not None:
            time.sleep(draws.uniform(0, 5 * WORK_SECONDS))
            self._strike(victim, way)
        found = [self._answer(number) for number in range(FLOWS)]
        return found, victim

    def _strike(self, victim: int, way: str) -> None:
        process = self.members[victim][0]
        if way == "killed":
            process.kill()
            return
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * TTL_SECONDS[way])
        os.kill(process.pid, signal.SIGCONT)

    def _answer(self, number: int) -> Attempt | str:
        process, pipe = self.members[number]
        try:
            answer: Attempt | str = pipe.recv()
        except EOFError:
            process.join()
            self.members[number] = self._start()
            answer = "killed"
        return answer

    def end(self) -> None:
        for process, _ in self.members:
            process.kill()
            process.join()


def _serve(pipe: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # that of the server which forks is older
    while True:
        try:
            answer: Attempt | str = race(pipe.recv())
        except EOFError:
            return
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def wrong(task: Task, answers: list[Attempt | str], struck: int | None, way: str) -> list[str]:
    """What is not as it should be after a race of which `task` is any flow's."""
    found = []
    lines = [line.split() for line in task.log.read_text().splitlines()]
    for fingerprint, times in Counter(fingerprint for fingerprint, _ in lines).items():
        by_struck = any(number == f"{struck}" for one, number in lines if one == fingerprint)
        if times > 1 + by_struck:
            found.append(f"{fingerprint[:8]} was worked on {times} times")
    attempts = []
    for number, answer in enumerate(answers):
        if isinstance(answer, Attempt):
            attempts.append(answer)
            found += [f"flow {number}: {error}" for error in answer.errors]
        elif not (number == struck and way == "killed"):
            found.append(f"flow {number}: {answer}")
    common = {(one.outputs.get("model"), one.outputs.get("report")) for one in attempts}
    if len(common) != 1 or None in next(iter(common)):
        found.append(f"flows end with {common}")
    with installed():
        store = open_store(task.url)
        found += unsound(store)
        for stage in ("rows", "train", "score"):
            made: dict[str, set[Any]] = {}
            for record in store.stage_records(stage):
                made.setdefault(record.fingerprint, set()).update(record.outputs.values())
            found += [
                f"{stage} {one[:8]} gave {len(outputs)} results" for one, outputs in made.items() if len(outputs) > 1
            ]
    return found


def races(flows_of: Flows, url: str, folder: Path, count: int, outcome: Outcome, where: str) -> None:
    """So many races, each on a store of its own."""
    draws = random.Random(outcome.seed)
    folder.mkdir()
    for number in range(count):
        log = folder / f"{number}.log"
        log.touch()
        way = WAYS[number % len(WAYS)]
        ttl = TTL_SECONDS.get(way, LONG_SECONDS)
        tasks = [Task(f"{url}/{outcome.seed}-{number}", one, number + 2, log, ttl) for one in range(FLOWS)]
        answers, struck = flows_of.race(tasks, way, draws)
        outcome.counts[f"races of {FLOWS} flows {where}"] += 1
        if struck is not None:
            outcome.counts[f"flows {way}"] += 1
        outcome.counts["stages worked on"] += len(log.read_text().splitlines())
        outcome.anomalies += [f"{where}, race {number}: {text}" for text in wrong(tasks[0], answers, struck, way)]


@contextmanager
def _running() -> Iterator[Flows]:
    flows_of = Flows()
    try:
        yield flows_of
    finally:
        flows_of.end()


def on_disk(count: int, outcome: Outcome) -> None:
    """So many races on a local disk."""
    with tempfile.TemporaryDirectory() as folder, _running() as flows_of:
        races(flows_of, f"{folder}/stores", Path(folder) / "logs", count, outcome, "on a local disk")


def on_s3(count: int, outcome: Outcome) -> None:
    """So many races on S3."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"POSTTRAIN_CACHE": f"{folder}/cache"}):
        with s3_server("races"), _running() as flows_of:
            races(flows_of, "s3://races", Path(folder) / "logs", count, outcome, "on S3")


def campaign(count: int, seed: int) -> Outcome:
    """So many races on a local disk, and as many on S3."""
    outcome = Outcome(seed)
    on_disk(count, outcome)
    on_s3(count, outcome)
    return outcome
