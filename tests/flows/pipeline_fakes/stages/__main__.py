"""The stage `make` as a process: writes its text after those of its inputs, into the real store."""

import json
import sys
import time
from pathlib import Path

from artifacts import Artifact, Record, open_store

spec = json.loads(Path(sys.argv[1]).read_text())
job, config, store = Path(spec["job"]), spec["config"], open_store(spec["store"])


def event(**values: object) -> None:
    with open(job / "events.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def fail(message: str) -> None:
    error = {"type": "DataError", "message": message, "traceback": "", "expected": True}
    error["fails_again"] = True
    (job / "error.json").write_text(json.dumps(error))
    sys.exit(1)


def text_of(wired: dict) -> str:
    folder = store.materialize(Artifact(wired["kind"], wired["artifact"].removeprefix("sha256:")))
    return (folder / "text").read_text()


with open(config["log"], "a") as log:
    log.write(f"{spec['name']}\n")
event(kind="progress", step=1, total=2, unit="step", values={"loss": 2.0})
if config["fail"]:
    fail(config["fail"])
if config["taken"] and not Path(config["taken"]).exists():
    Path(config["taken"]).touch()
    raise OSError(98, "Address already in use")
if config["refuses"] and config["text"] == config["refuses"]:
    fail(f"the text {config['text']} is refused")
while config["until"] and not Path(config["until"].replace("{text}", config["text"])).exists():
    time.sleep(0.02)
out = job / "out" / "dataset"
out.mkdir(parents=True)
(out / "text").write_text("".join(map(text_of, spec["inputs"].get("source", []))) + config["text"])
metrics = {"length": len((out / "text").read_text())}
made = store.put("dataset", out, producer=spec["identity"], metrics=metrics, counts={})
provenance = {"run": spec["run"], "recipe": spec["recipe"], "stage_name": spec["name"]}
store.append_record(
    Record(
        stage=spec["stage"],
        fingerprint=spec["fingerprint"],
        identity=spec["identity"],
        outputs={"dataset": made},
        metrics=metrics,
        provenance=provenance,
    )
)
result = {"outputs": {"dataset": {"kind": "dataset", "id": made.id}}, "metrics": metrics}
result |= {"timings": {}, "counts": {}, "resumed_from": None}
(job / "result.json").write_text(json.dumps(result))
