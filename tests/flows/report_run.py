"""A small run in a real store, for the report: every artifact kind, two models, text that tries to be HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from artifacts import Artifact, Record, Store, open_store, sha256_bytes
from stages.stage import Config, Stage, operational

ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
STEPS = 12
METRICS = [
    {"step": step, "loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-5 * step, "num_tokens": 100 * step}
    for step in range(1, STEPS + 1)
]
LEDGER = {
    "input": 100,
    "states": {"used": 90, "duplicate": 7, "filtered: too long": 3},
    "truncated_tokens": 41,
    "examples": {"filtered: too long": [{"row": "r-4", "detail": ATTACK}]},
}
RESULTS = {
    "base": {"accuracy": {"value": 0.125, "low": 0.05, "high": 0.2, "n": 40}},
    "sft": {
        "accuracy": {"value": 0.75, "low": 0.625, "high": 0.875, "n": 40},
        "loss": {"value": 1.5, "low": 1.25, "high": 1.75, "n": 40},
    },
}
SAMPLES = {
    # row id, completion, correct; the second file is in another order and lacks a row
    "base": [("r-1", "4", True), ("r-2", "5", False), ("r-3", ATTACK, False), ("r-4", "9", True)],
    "sft": [("r-3", "7", True), ("r-1", "4", True), ("r-2", "6", False)],
}


class SmallConfig(Config):
    """Stands for every stage's configuration."""

    learning_rate: float = 1e-5
    """Peak of the schedule."""
    num_train_epochs: int = 1
    sampling: dict[str, float] = Field({"temperature": 1.0, "top_p": 1.0})
    logging_steps: int = operational(10)


def small_stage(name: str) -> Stage:
    """In place of `load_stage`: the report needs the Config and the main metric of a stage."""
    return Stage(name, 1, SmallConfig, {}, {}, lambda context: None, main_metric="loss")


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def samples(model: str) -> str:
    rows = [
        {
            "row_id": row_id,
            "prompt": [{"role": "user", "content": f"What is {row_id}? {ATTACK}"}],
            "completion": [{"role": "assistant", "content": completion}],
            "correct": correct,
            "answer": "4",
        }
        for row_id, completion, correct in SAMPLES[model]
    ]
    return jsonl(rows)


class SmallRun:
    """Builds `payload` and the recipe stage by stage; `store` holds what they made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(str(folder / "store"))
        self.stages: dict[str, dict[str, Any]] = {}
        self.recipe: dict[str, dict[str, Any]] = {}

    def put(self, kind: str, files: Mapping[str, str], uses: str, inputs: Mapping[str, str]) -> Artifact:
        folder = self.store.scratch / f"new-{len(list(self.store.artifacts()))}"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        digests = {name: identifier.removeprefix("sha256:") for name, identifier in inputs.items()}
        producer = {"stage": uses, "version": 1, "config": {}, "inputs": digests}
        return self.store.put(kind, folder, producer=producer)

    def stage(
        self,
        name: str,
        uses: str,
        inputs: Mapping[str, str],
        outputs: Mapping[str, tuple[str, Mapping[str, str]]],
        config: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """`inputs` as in a recipe: `sft`, `chats.train`, `@alias`."""
        identifiers = {key: self._identifier(reference) for key, reference in inputs.items()}
        made = {key: self.put(kind, files, uses, identifiers) for key, (kind, files) in outputs.items()}
        fingerprint = sha256_bytes(json.dumps([name, config, identifiers]).encode())
        self.recipe[name] = {"uses": uses, "inputs": dict(inputs), "with": dict(config or {})}
        self.stages[name] = {
            "uses": uses,
            "state": "ran",
            "seconds": 3.5,
            "fingerprint": fingerprint,
            "reason": "never ran before",
            "reasons": ["never ran before"],
            "inputs": {key: [identifier] for key, identifier in identifiers.items()},
            "outputs": {key: artifact.to_json() for key, artifact in made.items()},
            "metrics": {},
            "timings": {},
            "counts": {},
            "command": ["python", "-m", "stages", "a spec.json"],
            "error": None,
            "resumed_from": None,
            **fields,
        }
        identity = {"stage": uses, "version": 1, "config": dict(config or {}), "inputs": identifiers}
        self.store.append_record(Record(uses, fingerprint, identity, made, provenance={"versions": {"torch": "2"}}))

    def gate(self, name: str, model: str, candidate: str) -> None:
        """A stage that hands on a model and its evaluation."""
        inputs = {"model": model, "candidate": candidate}
        self.stage(name, "gate", inputs, {"verdict": ("verdict", {"verdict.json": "{}"})})
        handed_on = (("model", model), ("evaluation", candidate))
        outputs = {output: {"id": self.output(stage), "kind": output} for output, stage in handed_on}
        self.stages[name]["outputs"] = {**outputs, **self.stages[name]["outputs"]}

    def output(self, name: str) -> str:
        """The id of a stage's first output."""
        outputs: dict[str, dict[str, str]] = self.stages[name]["outputs"]
        return next(iter(outputs.values()))["id"]

    def payload(self) -> dict[str, Any]:
        return {
            "run": "run-1",
            "recipe": "small",
            "state": "failed" if any(entry["error"] for entry in self.stages.values()) else "ok",
            "seconds": 75.0,
            "started_at": "2026-01-02 03:04:05",
            "recipe_yaml": yaml.safe_dump({"name": "small", "stages": self.recipe}, sort_keys=False),
            "stages": self.stages,
        }

    def _identifier(self, reference: str) -> str:
        stage, _, output = reference.partition(".")
        if stage not in self.stages:
            return "owner/name@0123456789"
        return self.stages[stage]["outputs"][output]["id"] if output else self.output(stage)


def small_run(folder: Path) -> SmallRun:
    """zebra_data -> sft -> two evaluations; the names are not in alphabetical order on purpose."""
    run = SmallRun(folder)
    dataset = {
        "data.parquet": "rows",
        "dataset.json": json.dumps({"type": "prompt", "rows": 90, "source": {"path": "rows.jsonl"}}),
        "ledger.json": json.dumps(LEDGER),
    }
    run.stage("zebra_data", "normalize", {}, {"train": ("dataset", dataset)}, {"learning_rate": 1e-5}, state="cached")
    run.stage("base", "init_model", {"dataset": "zebra_data"}, {"model": ("model", {"config.json": "{}"})})
    trained = {
        "config.json": "{}",
        "metrics.jsonl": jsonl(METRICS),
        "samples.jsonl": jsonl([{"step": 3, "prompt": "p", "completion": ATTACK, "reward": 0.5}]),
    }
    run.stage(
        "sft",
        "sft",
        {"model": "base", "dataset": "zebra_data.train"},
        {"model": ("model", trained)},
        {"learning_rate": 2e-4, "sampling": {"temperature": 0.5}},
        metrics={"loss": 2.0 / STEPS},
        timings={"tokens_per_second": 1234.5},
        resumed_from=7,
        earlier_seconds=61.5,
    )
    for model in ("base", "sft"):
        files = {"results.json": json.dumps(RESULTS[model]), "samples.jsonl": samples(model)}
        inputs = {"model": model, "dataset": "zebra_data.train"}
        run.stage(f"{model}_eval", "evaluate", inputs, {"evaluation": ("evaluation", files)})
    return run
