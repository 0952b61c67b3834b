"""The stage `walk` as a process: some steps with a checkpoint after every second one, then a file that follows from
its text and from what it reads. In the middle it may fail, kill itself once, or wait to be stopped."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from artifacts import Artifact, Record, open_store, sha256_bytes

spec = json.loads(Path(sys.argv[1]).read_text())
job, config, store = Path(spec["job"]), spec["config"], open_store(spec["store"])
checkpoints = store.checkpoints(spec["fingerprint"])


def event(**values: object) -> None:
    with open(job / "events.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def fail(message: str) -> None:
    error = {"type": "DataError", "message": message, "traceback": "", "expected": True}
    (job / "error.json").write_text(json.dumps(error))
    sys.exit(1)


def text_of(wired: dict) -> bytes:
    folder = store.materialize(Artifact(wired["kind"], wired["artifact"].removeprefix("sha256:")))
    return (folder / "text").read_bytes()


def in_the_middle() -> None:
    event(kind="log", text="in the middle")
    if config["trouble"] == "fail":
        fail("a failure that was asked for")
    if config["trouble"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if config["trouble"] == "wait":
        time.sleep(600)


def save(step: int, state: bytes) -> None:
    folder = job / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "state").write_bytes(state)
    checkpoints.save(step, folder)


source = b"".join(text_of(wired) for wired in spec["inputs"].get("source", []))
found = checkpoints.latest()
step, state = (0, source) if found is None else (found[0], (found[1] / "state").read_bytes())
resumed_from = step or None
while step < config["steps"]:
    step, state = step + 1, sha256_bytes(state + config["text"].encode()).encode()
    event(kind="progress", step=step, total=config["steps"], unit="step", values={"loss": 1 / step})
    if step % 2 == 0 and step < config["steps"]:
        save(step, state)
        if config["trouble"] and step > config["steps"] // 2:
            in_the_middle()
out = job / "out" / "dataset"
out.mkdir(parents=True)
(out / "text").write_bytes(state)
metrics = {"length": len(state)}
made = store.put("dataset", out, producer=spec["identity"], metrics=metrics, counts={})
store.append_record(
    Record(
        stage=spec["stage"],
        fingerprint=spec["fingerprint"],
        identity=spec["identity"],
        outputs={"dataset": made},
        metrics=metrics,
        provenance={"run": spec["run"], "recipe": spec["recipe"], "stage_name": spec["name"]},
    )
)
checkpoints.clear()
result = {"outputs": {"dataset": {"kind": "dataset", "id": made.id}}, "metrics": metrics}
result |= {"timings": {}, "counts": {}, "resumed_from": resumed_from}
(job / "result.json").write_text(json.dumps(result))
