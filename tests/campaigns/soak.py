"""One store, one `posttrain ui`, one process that runs recipes again and again: hits, misses, failures, killed and
cancelled runs that are taken up later, runs of the worker that end or are cancelled, and upkeep. The processes that
stay hold the same after many cycles as after a few (`flatness`), and every result is the one it was the first time.
What is kept up to a number is full before the minutes begin (`soak_filling`): then whatever grows has no end.

Files of others in /dev/shm count as well: where others work, give it one of its own (`unshare -m sh -c "mount -t tmpfs
tmpfs /dev/shm; exec python -m tests.campaigns soak"`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from prefect.states import Cancelling

from tests.campaigns import soak_driver
from tests.campaigns.flatness import MEMORY_SHARE, Series, described, grown
from tests.campaigns.outcome import Outcome
from tests.campaigns.soak_filling import fill
from tests.flows.lasting_ui import ROOT, Ui, until

KINDS = ("hit",) * 6 + ("miss", "fail", "die", "cancel")
"""Drawn from, one for each cycle. What failed, died or was cancelled is taken up by the cycle after it."""
UPKEEP_EVERY, WORKER_EVERY = 20, 20
"""Cycles. What the worker keeps grows by a step with each of its runs: of a few steps the line through most samples
would see none."""
WARM_UP = (*KINDS, "upkeep", *(("worker run", *KINDS, "cancelled worker run") * 8))
"""The cycles before the minutes: what is loaded when it is first needed is loaded, and what Python has room for between
its objects is found, which takes a hundred runs, of the worker a dozen."""
DONE = {"first": "cached", "second": "ran", "third": "ran"}
ENDS: dict[str, Any] = {
    "hit": dict.fromkeys(DONE, "cached"),
    "miss": DONE,
    "fail": {"first": "cached", "second": "failed", "third": "skipped"},
    "die": {"first": "cached", "second": "failed", "third": "skipped"},
    "cancel": "interrupted",
    "resume": DONE,
}
"""Kind -> how its stages end."""
PLURALS = {"miss": "misses", "fail": "failures", "die": "deaths of a stage", "upkeep": "verified and swept"}
LINE_EVERY = 50
RESUMED_AT = 4
"""The step of the last checkpoint before the middle."""
SECONDS_UNTIL_GONE = 10.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Samples:
    """Figure -> (cycle, value) of each sample."""

    processes: dict[str, psutil.Process]
    folders: tuple[Path, ...]
    """Where temporary files would be."""
    counts: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, cycle: int) -> None:
        """Now, at the end of a cycle."""
        for name, process in self.processes.items():
            with process.oneshot():
                self.memory[f"{name} memory"].append((cycle, process.memory_info().rss))
                self.counts[f"{name} handles"].append((cycle, process.num_fds()))
                self.counts[f"{name} threads"].append((cycle, process.num_threads()))
            self.counts[f"{name} children"].append((cycle, len(process.children(recursive=True))))
        files = sum(len(found) for folder in self.folders for _, _, found in os.walk(folder))
        self.counts["temporary files"].append((cycle, files))

    def last(self) -> str:
        """The memory of each process now."""
        return ", ".join(f"{name} {samples[-1][1] / 1e6:.1f} MB" for name, samples in self.memory.items())

    def judged(self) -> Iterator[str]:
        """What grew."""
        yield from filter(None, map(grown, self.series()))

    def measured(self) -> Iterator[str]:
        """The memory of each process."""
        yield from (described(series) for series in self.series() if series.growth_share is not None)

    def series(self) -> list[Series]:
        """All of them."""
        memory = [Series(name, samples, MEMORY_SHARE) for name, samples in self.memory.items()]
        return memory + [Series(name, samples) for name, samples in self.counts.items()]


class Driver:
    """The process that runs recipes; `ask` for a cycle."""

    def __init__(self, ui: Ui) -> None:
        self._log = open(ui.folder / "driver.log", "w")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, soak_driver.__file__, str(ui.folder)],
            cwd=ROOT,
            env=ui.environment | {"MALLOC_ARENA_MAX": "1"},  # as docs/operations.md says of such a process
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, kind: str, text: str = "") -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"kind": kind, "text": text}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the driver ended: {Path(self._log.name).read_text()[-2000:]}"
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._log.close()


@contextmanager
def running(folder: Path) -> Iterator[tuple[Ui, Driver]]:
    """Server, worker and driver, whose temporary files have a folder of their own."""
    (folder / "temporary").mkdir()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TMPDIR": str(folder / "temporary")}))
        ui = Ui(folder)
        stack.callback(ui.process.wait, 60)
        stack.callback(ui.process.terminate)
        deployed = ui.command("deploy", str(ui.recipe))
        assert deployed.returncode == 0, deployed.stderr
        driver = Driver(ui)
        stack.callback(driver.close)
        yield ui, driver


def staying(ui: Ui, driver: Driver) -> dict[str, psutil.Process]:
    """The processes that are there from the first cycle to the last."""
    found = {"driver": psutil.Process(driver.process.pid), "ui": psutil.Process(ui.process.pid)}
    for process in found["ui"].children(recursive=True):
        for name, mark in (("server", "server_process.py"), ("supervisor", "supervise.py"), ("worker", "worker")):
            if name not in found and any(part.endswith(mark) for part in process.cmdline()):
                found[name] = process
                break
    assert len(found) == 5, found
    return found


@dataclass
class Cycles:
    """Tries one cycle after the other, and says what ended otherwise than it should."""

    ui: Ui
    driver: Driver
    outcome: Outcome
    good: str = "0"
    """The text of the last run that went well."""
    pending: str = ""
    """The text of the last run that did not."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Text -> what it gave."""

    def attempt(self, number: int, kind: str) -> None:
        self.outcome.counts[PLURALS.get(kind, f"{kind}s")] += 1
        if kind.endswith("worker run"):
            problem = self._by_the_worker(cancelled=kind != "worker run")
        elif kind == "upkeep":
            found = self.driver.ask(kind)["problems"]
            problem = f"damaged: {found[:3]}" if found else None
        else:
            problem = self._run(kind, {"hit": self.good, "resume": self.pending}.get(kind, str(number)))
        if problem is not None:
            self.outcome.anomalies.append(f"cycle {number}, {kind}: {problem}")

    def _run(self, kind: str, text: str) -> str | None:
        answer = self.driver.ask(kind, text)
        if answer["states"] != ENDS[kind]:
            return f"ended as {answer}"
        if kind in soak_driver.TROUBLE:
            self.pending = text
            return self._left()
        self.good = text
        if self.outputs.setdefault(text, answer["outputs"]) != answer["outputs"]:
            return f"gave {answer['outputs']}, and before {self.outputs[text]}"
        resumed = answer["resumed_from"] if kind == "resume" else RESUMED_AT
        return None if resumed == RESUMED_AT else f"resumed from {resumed}"

    def _by_the_worker(self, cancelled: bool) -> str | None:
        run = self.ui.ask(**({} if cancelled else {"only": ["rows"], "force": ["rows"]}))
        with self.ui.client() as client:
            if cancelled:
                until(lambda: client.read_flow_run(run.id).state_name == "Running")
                client.set_flow_run_state(run.id, Cancelling())
            state = self.ui.ended(run, client).state_name
        expected = "Cancelled" if cancelled else "Completed"
        return self._left() if state == expected else f"ended as {state}"

    def _left(self) -> str | None:
        """What still runs ten seconds later of runs that have ended."""
        deadline = time.monotonic() + SECONDS_UNTIL_GONE
        while found := self.ui.processes():
            if time.monotonic() > deadline:
                return f"left running: {found}"
            time.sleep(0.05)
        return None


def campaign(minutes: float, seed: int) -> Outcome:
    """So many minutes of cycles, after a warm-up."""
    outcome = Outcome(seed)
    with tempfile.TemporaryDirectory() as temporary, running(Path(temporary)) as (ui, driver):
        places = (Path(temporary) / "temporary", ui.store_folder / "tmp", ui.store_folder / "claims", SHARED_MEMORY)
        samples, cycles = Samples(staying(ui, driver), places), Cycles(ui, driver, outcome)
        driver.ask("miss", cycles.good)
        print(f"{fill(ui.url):,} events fill what the server keeps", flush=True)
        for number, kind in enumerate(_resumed(WARM_UP), -2 * len(WARM_UP)):
            cycles.attempt(number, kind)
        outcome.counts.clear()
        deadline = time.monotonic() + 60 * minutes
        for number, kind in enumerate(_resumed(_drawn(seed)), 1):
            if time.monotonic() > deadline:
                break
            cycles.attempt(number, kind)
            samples.take(number)
            outcome.counts["cycles"] = number
            if number % LINE_EVERY == 0:
                print(f"{outcome.line()}; {samples.last()}", flush=True)
    outcome.anomalies += samples.judged()
    outcome.notes += samples.measured()
    print("; ".join(map(described, samples.series())), flush=True)
    return outcome


def _drawn(seed: int) -> Iterator[str]:
    """Kinds of cycles without end."""
    draws = random.Random(seed)
    for number in itertools.count(1):
        if number % WORKER_EVERY == 0:
            yield "cancelled worker run" if number % (2 * WORKER_EVERY) == 0 else "worker run"
        if number % UPKEEP_EVERY == 0:
            yield "upkeep"
        yield draws.choice(KINDS)


def _resumed(kinds: Iterable[str]) -> Iterator[str]:
    """After trouble comes `resume`."""
    for kind in kinds:
        yield kind
        if kind in soak_driver.TROUBLE:
            yield "resume"
