"""SIGKILL of real processes in a real run: nothing is left running, and the rest of the work gives the same bits.

The recipe has every kind of stage of the quickstart, one of them in two processes. In run after run whatever stage
starts is killed, at a step of its progress or some time after its start, until it has been killed a few times; the next
run takes it up. Flows are killed at any time, also while they start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.campaigns.outcome import Outcome
from tests.tiny_recipe import write_recipe

ROOT = Path(__file__).resolve().parents[2]
SECONDS_UNTIL_GONE = 10.0
_PATIENCE_SECONDS = 240.0
MOST_KILLS = 2
"""Of each process of a stage on one store; then it may end."""
FLOW_SHARE = 0.4
"""Of the runs whose flow is killed."""
FLOW_SECONDS = 20.0
"""After its start, at most."""
MOST_RUNS = 40
"""With kills, on one store; so many are needed only where stages are killed before they get anywhere."""

TRAINING = {"learning_rate": 1e-3, "train_batch_size": 8, "max_length": 48, "max_steps": 120, "checkpoint_steps": 5}
GENERATING = {"rewards": ["task.py:length"], "max_completion_length": 5}
STAGES: dict[str, Any] = {
    "sft": {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}, "with": TRAINING},
    "samples": {
        "uses": "sample",
        "inputs": {"model": "sft", "dataset": "rows"},
        "with": {**GENERATING, "num_generations": 3, "outputs": ["pairs"]},
    },
    "reference": {
        "uses": "reference_logprobs",
        "inputs": {"model": "sft", "dataset": "pairs"},
        "with": {"max_length": 48, "shard_rows": 8, "micro_batch_tokens": 64},
    },
    "dpo": {
        "uses": "preference",
        "inputs": {"model": "sft", "dataset": "pairs", "reference_logprobs": "reference"},
        "with": TRAINING,
    },
    "two_ranks": {
        "uses": "sft",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {**TRAINING, "seed": 2},
        "launch": {"processes": 2, "threads": 1},
    },
    "reward": {"uses": "reward_model", "inputs": {"model": "sft", "dataset": "samples.pairs"}, "with": TRAINING},
    "grpo": {
        "uses": "rl",
        "inputs": {"model": "dpo", "dataset": "rows"},
        "with": {**TRAINING, **GENERATING, "num_generations": 4, "train_batch_size": 16, "steps_per_generation": 2},
    },
    "student": {
        "uses": "distill",
        "inputs": {"model": "base", "teacher": "sft", "dataset": "rows"},
        "with": {**TRAINING, "beta": 0.0, "lmbda": 0.0, "max_completion_length": 5},
    },
    "eval": {
        "uses": "evaluate",
        "inputs": {"model": "sft", "dataset": "rows"},
        "with": {"tasks": ["accuracy", "loss"], **GENERATING, "temperature": 1.0, "num_generations": 4},
    },
}
TRAINS = ("sft", "dpo", "two_ranks", "reward", "grpo", "student")


@dataclass(frozen=True)
class Kill:
    """Kill `victim` (flow, supervisor, stage, rank) of a stage once it has reported `step` steps of progress and
    has been there for `seconds`. A flow without a stage is killed so many seconds after its own start."""

    stage: str
    victim: str
    step: int = 0
    seconds: float = 0.0


def start(recipe: Path, store: Path, prefect_home: Path) -> subprocess.Popen[bytes]:
    """`posttrain run` as a user starts it."""
    # stages are of this tree, wherever another one is installed
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--store", str(store), "--json"]
    with open(store.parent / "run.log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """Wait for the end; the JSON that it printed. None: it was killed before."""
    output, _ = process.communicate(timeout=_PATIENCE_SECONDS)
    return json.loads(output) if process.returncode >= 0 else None


def processes_of(folder: Path) -> Iterator[psutil.Process]:
    """Every living process that works in a folder, by the marks in its environment or its command line: of stages, and
    where it is the folder of the whole run also the flow and Prefect's server."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            marks = (environment.get("POSTTRAIN_JOB", ""), environment.get("PREFECT_HOME", ""), *process.cmdline())
            if (
                any(mark == str(folder) or mark.startswith(f"{folder}/") for mark in marks)
                and process.status() != psutil.STATUS_ZOMBIE
                and process.pid != os.getpid()
            ):
                yield process
        except psutil.Error:
            continue


def left_after(folder: Path) -> list[str]:
    """What still lives of the processes that work in a folder after ten seconds, in words."""
    deadline = time.monotonic() + SECONDS_UNTIL_GONE
    while living := list(processes_of(folder)):
        if time.monotonic() > deadline:
            return [f"{SECONDS_UNTIL_GONE:.0f} s after a kill there still is {process}" for process in living]
        time.sleep(0.1)
    return []


class Striker(threading.Thread):
    """Waits for the point of a kill, kills, and sees to it that nothing of the stage is left."""

    def __init__(self, flow: subprocess.Popen[bytes], store: Path, kill: Kill) -> None:
        super().__init__(daemon=True)
        self.flow, self.store, self.kill = flow, store, kill
        self.known = set(_jobs(store, kill.stage))
        self.struck, self.left = False, list[str]()
        self.start()

    def run(self) -> None:
        if not self.kill.stage:
            if _ended_within(self.flow, self.kill.seconds):
                return
            self._strike(self.flow.pid, self.store.parent)
        seen: float | None = None
        while not self.struck and self.flow.poll() is None:
            jobs = [job for job in _jobs(self.store, self.kill.stage) if job not in self.known]
            if jobs:
                seen = seen or time.monotonic()
                due = time.monotonic() - seen >= self.kill.seconds and _steps(jobs[0]) >= self.kill.step
                if due and (victim := _victim(self.flow, jobs[0], self.kill.victim)) is not None:
                    self._strike(victim, self.store.parent if self.kill.victim == "flow" else jobs[0])
                if (jobs[0] / "result.json").exists():
                    return
            time.sleep(0.1)

    def _strike(self, victim: int, folder: Path) -> None:
        os.kill(victim, signal.SIGKILL)
        self.struck = True
        self.left = left_after(folder)


def _ended_within(flow: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and flow.poll() is None:
        time.sleep(0.1)
    return flow.poll() is not None


def _jobs(store: Path, stage: str) -> list[Path]:
    return sorted(store.glob(f"scratch/*/{stage}"))


def _steps(job: Path) -> int:
    """Steps of the last progress event; 0 before the first."""
    try:
        lines = (job / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return max((event["step"] for event in events if event["kind"] == "progress"), default=0)


def _victim(flow: subprocess.Popen[bytes], job: Path, name: str) -> int | None:
    if name == "flow":
        return flow.pid
    for process in processes_of(job):
        try:
            if name == _role(process):
                return process.pid
        except psutil.Error:
            continue
    return None


def _role(process: psutil.Process) -> str:
    if any(part.endswith("supervise.py") for part in process.cmdline()):
        return "supervisor"
    return "rank" if process.environ().get("RANK") == "1" else "stage"


@dataclass
class Site:
    """A folder with a recipe, its store and Prefect's home."""

    folder: Path
    stages: dict[str, Any] = field(default_factory=lambda: STAGES)

    def __post_init__(self) -> None:
        self.recipe = write_recipe(self.folder / "recipe", self.stages)
        self.store = self.folder / "store"
        self.struck = Counter[str]()
        """How often each stage was."""

    def run(self, kills: Iterable[Kill] = ()) -> tuple[dict[str, Any] | None, list[Striker]]:
        """One run in spite of the kills; (its payload or None, the kills)."""
        flow = start(self.recipe, self.store, self.folder / "prefect")
        with ExitStack() as stack:
            stack.callback(flow.kill)
            strikers = [Striker(flow, self.store, kill) for kill in kills]
            payload = finish(flow)
            for striker in strikers:
                striker.join(SECONDS_UNTIL_GONE + 5)
        return payload, strikers

    def run_with(self, rounds: Iterable[Iterable[Kill]], outcome: Outcome) -> dict[str, Any] | None:
        """Run after run with kills, and one without unless all has ended well before; the last payload."""
        for kills in rounds:
            payload, strikers = self.run(kills)
            for striker in filter(lambda striker: striker.struck, strikers):
                outcome.counts["SIGKILLs"] += 1
                outcome.counts[f"of a {striker.kill.victim}"] += 1
                self.struck[striker.kill.stage] += 1
                outcome.anomalies += [f"{striker.kill}: {text}" for text in striker.left]
                if payload is not None and striker.kill.victim != "flow":
                    state = payload["stages"][striker.kill.stage]["state"]
                    # what was struck while it left had published everything
                    if state not in ("failed", "ran"):
                        outcome.anomalies.append(f"{striker.kill}: the stage is entered as {state}")
            if payload is not None and payload["state"] == "ok":
                return payload
        payload, _ = self.run()
        return payload


def outputs(payload: dict[str, Any] | None) -> dict[str, Any]:
    """Stage -> output -> artifact id. Raises AssertionError for a run that did not end well."""
    assert payload is not None and payload["state"] == "ok", json.dumps(payload, indent=1)
    return {
        name: {output: found["id"] for output, found in entry["outputs"].items()}
        for name, entry in payload["stages"].items()
    }


def drawn(draws: random.Random, seconds: Mapping[str, float], struck: Mapping[str, int]) -> Iterator[list[Kill]]:
    """Kills for the runs of one store. `seconds`: how long each stage takes; `struck`: how often each one was."""
    for _ in range(MOST_RUNS):
        kills = [
            _drawn_kill(stage, draws, seconds[stage])
            for stage in seconds
            if struck.get(stage, 0) < MOST_KILLS * (2 if stage == "two_ranks" else 1)
        ]
        if draws.random() < FLOW_SHARE:
            kills.append(Kill("", "flow", seconds=draws.uniform(0, FLOW_SECONDS)))
        yield kills


def _drawn_kill(stage: str, draws: random.Random, seconds: float) -> Kill:
    victims = ["stage", "stage", "supervisor", *(["rank"] * 6 if stage == "two_ranks" else [])]
    victim = draws.choice(victims)
    if stage in TRAINS and draws.random() < 0.6:
        return Kill(stage, victim, step=draws.randrange(1, 80))
    return Kill(stage, victim, seconds=draws.uniform(0, 0.8 * seconds))


def campaign(kills: int, seed: int, clean: Path | None = None) -> Outcome:
    """At least so many kills. `clean`: a file with the results of a run without any, made where it is not there."""
    outcome, draws = Outcome(seed), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        expected = _clean(Path(temporary) / "clean", clean)
        seconds = {name: entry["seconds"] for name, entry in expected["stages"].items()}
        while outcome.counts["SIGKILLs"] < kills:
            site = Site(Path(temporary) / f"{outcome.counts['SIGKILLs']}")
            found, wanted = outputs(site.run_with(drawn(draws, seconds, site.struck), outcome)), outputs(expected)
            outcome.anomalies += [f"{name}: {found[name]}" for name in wanted if found[name] != wanted[name]]
            print(outcome.line(), flush=True)
    return outcome


def _clean(folder: Path, kept: Path | None) -> dict[str, Any]:
    """The payload of a run without kills."""
    if kept is not None and kept.exists():
        return dict(json.loads(kept.read_text()))
    payload = Site(folder).run()[0]
    outputs(payload)
    if kept is not None:
        kept.write_text(json.dumps(payload))
    return payload
