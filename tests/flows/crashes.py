"""SIGKILL at chosen points of a real run: nothing is left running, and the rest of the work gives the same bits.

`python -m tests.flows.crashes --kills 40 --seed 1` does it at random points, as often as one likes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.tiny_recipe import write_recipe

ROOT = Path(__file__).resolve().parents[2]
VICTIMS = ("flow", "supervisor", "stage")
SECONDS_UNTIL_GONE = 10.0
_PATIENCE_SECONDS = 240.0

TRAINING = {"learning_rate": 1e-3, "train_batch_size": 8, "max_length": 48, "checkpoint_steps": 3}
STAGES: dict[str, Any] = {
    "sft": {
        "uses": "sft",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {**TRAINING, "max_steps": 48},
    },
    "reference": {
        "uses": "reference_logprobs",
        "inputs": {"model": "sft", "dataset": "pairs"},
        "with": {"max_length": 48, "shard_rows": 8, "micro_batch_tokens": 64},
    },
    "dpo": {
        "uses": "preference",
        "inputs": {"model": "sft", "dataset": "pairs", "reference_logprobs": "reference"},
        "with": {**TRAINING, "max_steps": 48},
    },
    "grpo": {
        "uses": "rl",
        "inputs": {"model": "dpo", "dataset": "rows"},
        "with": {
            **TRAINING,
            "rewards": ["task.py:length"],
            "num_generations": 4,
            "train_batch_size": 16,
            "steps_per_generation": 2,
            "max_completion_length": 5,
            "max_steps": 48,
        },
    },
}


@dataclass(frozen=True)
class Kill:
    """Kill `victim` once the stage has reported `step` steps of progress (0: as soon as its process is there)."""

    stage: str
    victim: str
    step: int


def start(recipe: Path, store: Path, prefect_home: Path) -> subprocess.Popen[bytes]:
    """`posttrain run` as a user starts it."""
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--store", str(store), "--json"]
    log = open(store.parent / "run.log", "ab")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for the end; the JSON that it printed."""
    output, _ = process.communicate(timeout=_PATIENCE_SECONDS)
    payload: dict[str, Any] = json.loads(output)
    return payload


def processes_of(store: Path) -> Iterator[psutil.Process]:
    """Every living process of a stage of this store, by the mark in its environment or its command line."""
    for process in psutil.process_iter():
        try:
            mark = process.environ().get("POSTTRAIN_JOB", "") + " ".join(process.cmdline())
            if str(store) in mark and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                yield process
        except psutil.Error:
            continue


def kill_when_due(process: subprocess.Popen[bytes], store: Path, kill: Kill) -> bool:
    """Waits for the point and kills. False: the run ended before it came."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        job = _newest_job(store, kill.stage)
        if job is not None and _steps(job) >= kill.step:
            victim = _victim(process, job, kill.victim)
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                return True
        time.sleep(0.01)
    raise TimeoutError(f"{kill} did not come within {_PATIENCE_SECONDS} s")


def wait_until_gone(store: Path) -> float:
    """Seconds until no process of the store is left. Raises AssertionError after ten."""
    started = time.monotonic()
    while left := list(processes_of(store)):
        waited = time.monotonic() - started
        assert waited < SECONDS_UNTIL_GONE, f"after {waited:.1f} s there still are {left}"
        time.sleep(0.05)
    return time.monotonic() - started


def _newest_job(store: Path, stage: str) -> Path | None:
    jobs = sorted(store.glob(f"scratch/*/{stage}"))
    return jobs[-1] if jobs else None


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
        is_supervisor = any(part.endswith("supervise.py") for part in process.cmdline())
        if is_supervisor == (name == "supervisor"):
            return process.pid
    return None


def run_with_kills(folder: Path, kills: list[Kill]) -> tuple[dict[str, Any], int]:
    """Run to the end in spite of the kills; (payload of the last run, how many kills struck)."""
    recipe = write_recipe(folder / "recipe", STAGES)
    store, home = folder / "store", folder / "prefect"
    struck = 0
    for kill in kills:
        process = start(recipe, store, home)
        if kill_when_due(process, store, kill):
            struck += 1
            if kill.victim == "flow":
                process.wait()
            else:
                assert finish(process)["stages"][kill.stage]["state"] == "failed"
            wait_until_gone(store)
        else:
            finish(process)
    return finish(start(recipe, store, home)), struck


def outputs(payload: dict[str, Any]) -> dict[str, Any]:
    """Stage -> output -> artifact id."""
    assert payload["state"] == "ok", json.dumps(payload, indent=1)
    return {
        name: {output: found["id"] for output, found in entry["outputs"].items()}
        for name, entry in payload["stages"].items()
    }


def main() -> int:
    """Random kills; prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        clean, _ = run_with_kills(Path(temporary) / "clean", [])
        done = rounds = 0
        while done < options.kills:
            kills = [Kill(stage, draws.choice(VICTIMS), draws.randrange(24)) for stage in STAGES]
            payload, struck = run_with_kills(Path(temporary) / f"round-{rounds}", kills)
            assert outputs(payload) == outputs(clean), f"other artifacts after {kills}"
            done, rounds = done + struck, rounds + 1
            print(f"{done} kills in {rounds} rounds, 0 anomalies, seed {options.seed}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
