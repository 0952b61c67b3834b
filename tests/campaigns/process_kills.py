"""SIGKILL of real processes in a real run: nothing is left running, and the rest of the work gives the same bits.

The recipe has every kind of stage of the quickstart, one of them in two processes. A stage is killed again and
again, at a step of its progress or some time after its start, and taken up by the next run.
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
ROUNDS_OF_KILLS = 2
"""How often every stage is killed before it may end."""

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
    has been there for `seconds`."""

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
    """Every living process of the stages below a folder, by the mark in its environment or its command line."""
    for process in psutil.process_iter():
        try:
            mark = process.environ().get("POSTTRAIN_JOB", "") + " ".join(process.cmdline())
            if str(folder) in mark and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                yield process
        except psutil.Error:
            continue


def left_after(folder: Path) -> list[str]:
    """What still lives of the processes below a folder after ten seconds, in words."""
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
        seen: float | None = None
        while self.flow.poll() is None:
            jobs = [job for job in _jobs(self.store, self.kill.stage) if job not in self.known]
            if jobs:
                seen = seen or time.monotonic()
                due = time.monotonic() - seen >= self.kill.seconds and _steps(jobs[0]) >= self.kill.step
                if due and (victim := _victim(self.flow, jobs[0], self.kill.victim)) is not None:
                    os.kill(victim, signal.SIGKILL)
                    self.struck = True
                    self.left = left_after(self.store if self.kill.victim == "flow" else jobs[0])
                    return
                if (jobs[0] / "result.json").exists():
                    return
            time.sleep(0.05)


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
        """Run after run with kills, and one without; the payload of that."""
        for kills in rounds:
            payload, strikers = self.run(kills)
            for striker in strikers:
                outcome.counts["SIGKILLs"] += striker.struck
                outcome.anomalies += [f"{striker.kill}: {text}" for text in striker.left]
                if striker.struck and payload is not None and striker.kill.victim != "flow":
                    state = payload["stages"][striker.kill.stage]["state"]
                    # what was struck while it left had published everything
                    if state not in ("failed", "ran"):
                        outcome.anomalies.append(f"{striker.kill}: the stage is entered as {state}")
        payload, _ = self.run()
        return payload


def outputs(payload: dict[str, Any] | None) -> dict[str, Any]:
    """Stage -> output -> artifact id. Raises AssertionError for a run that did not end well."""
    assert payload is not None and payload["state"] == "ok", json.dumps(payload, indent=1)
    return {
        name: {output: found["id"] for output, found in entry["outputs"].items()}
        for name, entry in payload["stages"].items()
    }


GROUPS = (("rows", "pairs", "base"), ("sft", "two_ranks"), ("samples", "reference", "student", "eval"))
GROUPS += (("dpo", "reward"), ("grpo",))
"""Stages that do not wait for each other, in order: what follows from a killed one never starts in that run."""


def drawn(draws: random.Random, seconds: Mapping[str, float]) -> list[list[Kill]]:
    """Kills for the runs of one store: every stage again and again, and flows in the middle of it all. `seconds`:
    how long each stage takes."""
    rounds = []
    for group in GROUPS:
        for number in range(ROUNDS_OF_KILLS):
            kills = [_drawn_kill(stage, draws, seconds[stage]) for stage in group]
            if number % 2:
                last = kills[-1].stage
                kills[-1] = Kill(last, "flow", seconds=draws.uniform(0, seconds[last]))
            rounds.append(kills)
    return rounds


def _drawn_kill(stage: str, draws: random.Random, seconds: float) -> Kill:
    victims = ["stage", "stage", "supervisor", *(["rank"] * 3 if stage == "two_ranks" else [])]
    victim = draws.choice(victims)
    if stage in TRAINS and draws.random() < 0.6:
        return Kill(stage, victim, step=draws.randrange(1, 100))
    return Kill(stage, victim, seconds=draws.uniform(0, seconds))


def campaign(kills: int, seed: int, clean: Path | None = None) -> Outcome:
    """At least so many kills. `clean`: a file with the results of a run without any, made where it is not there."""
    outcome, draws = Outcome(seed), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        expected = _clean(Path(temporary) / "clean", clean)
        seconds = {name: entry["seconds"] for name, entry in expected["stages"].items()}
        while outcome.counts["SIGKILLs"] < kills:
            site = Site(Path(temporary) / f"{outcome.counts['SIGKILLs']}")
            found, wanted = outputs(site.run_with(drawn(draws, seconds), outcome)), outputs(expected)
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
