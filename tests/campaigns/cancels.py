"""Cancelling a stage whose processes resist: sessions of their own, SIGTERM ignored, a fork for every SIGTERM, a
daemon that left its parents, an open port. Ten seconds later nothing of it is there."""

from __future__ import annotations

import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from flows.launch import run_stage_process
from flows.launch_settings import Launch
from flows.stage_result import StageFailed
from flows.supervisors import Supervisors
from tests.campaigns.outcome import Outcome

SECONDS_UNTIL_GONE = 10.0
HERE = Path(__file__).parent
TREE = HERE / "resisting"
"""A package `stages` whose process is the tree."""
OTHERS = 3
"""How many processes of the tree announce themselves beside the launcher."""


def _living(mark: str) -> list[psutil.Process]:
    """The processes that carry the mark of a job."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("POSTTRAIN_JOB") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _by_cancelling(supervisors: Supervisors, supervisor: psutil.Process) -> None:
    """The pipe closes, as when the flow ends or is cancelled."""
    supervisors.stop()


def _by_signal(supervisors: Supervisors, supervisor: psutil.Process) -> None:
    supervisor.send_signal(signal.SIGTERM)
    supervisor.send_signal(signal.SIGTERM)


def _by_killing(supervisors: Supervisors, supervisor: psutil.Process) -> None:
    supervisor.kill()


WAYS: tuple[Callable[[Supervisors, psutil.Process], None], ...] = (_by_cancelling, _by_signal, _by_killing)


class Cancelled:
    """One stage of the resisting tree, started and ended."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.job = folder / "run" / "tree"
        self.ready = folder / "ready"
        self.supervisors = Supervisors()
        self.seed, self.draws = seed, random.Random(seed)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def problems(self) -> list[str]:
        """Start, cancel, and look what is left."""
        self.thread.start()
        launcher, port = self._started()
        time.sleep(self.draws.uniform(0, 0.2))
        way = WAYS[self.seed % len(WAYS)]
        way(self.supervisors, psutil.Process(psutil.Process(launcher).ppid()))
        deadline = time.monotonic() + SECONDS_UNTIL_GONE
        while (living := _living(str(self.job))) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [f"{way.__name__}: {process} is left" for process in living]
        for process in living:
            process.kill()
        if not living and not _is_free(port):
            found.append(f"{way.__name__}: port {port} is still open")
        self.thread.join(SECONDS_UNTIL_GONE)
        if not isinstance(self.error, StageFailed):
            found.append(f"{way.__name__}: the stage ended with {self.error!r}")
        return found

    def _started(self) -> tuple[int, int]:
        """(process id of the launcher, port of a worker), once all of the tree stands."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            lines = self.ready.read_text().split() if self.ready.exists() else []
            if len(lines) == 2 + OTHERS:
                given = dict(line.split("=") for line in lines)
                return int(given["launcher"]), int(given["port"])
            time.sleep(0.05)
        raise TimeoutError(f"the tree of {self.job} did not stand within 120 s: {self.error!r}")

    def _work(self) -> None:
        spec = {"name": "tree", "job": str(self.job), "threads": 1, "config": {"ready": str(self.ready)}}
        launch = Launch(env={"PYTHONPATH": str(TREE)})
        try:
            run_stage_process(spec, launch, lambda event: None, supervisors=self.supervisors)
        except BaseException as error:
            self.error = error


def campaign(cancels: int, seed: int, at_once: int = 8) -> Outcome:
    """So many cancels, some of them side by side."""
    outcome = Outcome(seed)

    def one(number: int) -> list[str]:
        with tempfile.TemporaryDirectory() as temporary:
            return Cancelled(Path(temporary), seed * 1_000_003 + number).problems()

    with ThreadPoolExecutor(at_once) as pool:
        for problems in pool.map(one, range(cancels)):
            outcome.counts["cancels"] += 1
            outcome.anomalies += problems
    return outcome
