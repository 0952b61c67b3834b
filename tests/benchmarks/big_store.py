"""A store of very many artifacts, and a recipe of very many stages of which it holds the results: made directly as
files, by the formats' own writers, in seconds instead of days.

Runs of one recipe, each of the same stages with other settings, so that every stage has many earlier records.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from artifacts import Artifact, Record, Store, open_store, seal, sha256_bytes
from artifacts.digest import FileEntry
from artifacts.manifest import Manifest
from flows.recipe import Recipe, RecipeStage
from stages.identity import fingerprint, identity

OLD_SECONDS = 90 * 86400
PAYLOAD = {"a": b"payload", "b": b"more"}


def write_recipe(stages: int, folder: Path) -> Path:
    """Chains of ten training stages from one model and one set of rows, each measured."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    declared: dict[str, Any] = {
        "rows": {"uses": "normalize", "with": {"source": {"path": str(rows)}, "type": "prompt_completion"}},
        "base": {"uses": "init_model", "inputs": {"dataset": "rows"}},
    }
    before = "base"
    while len(declared) < stages:
        number = len(declared)
        name, inputs = f"sft{number}", {"dataset": "rows"}
        options = {"learning_rate": 1e-5 * (1 + number), "max_steps": 10}
        declared[name] = {"uses": "sft", "inputs": {"model": before, **inputs}, "with": options}
        declared[f"eval{number}"] = {"uses": "evaluate", "inputs": {"model": name, **inputs}}
        before = "base" if number % 20 == 0 else name
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump({"name": "large", "stages": declared}, sort_keys=False))
    return path


@dataclass(frozen=True)
class _Step:
    stage: RecipeStage
    what: dict[str, Any]
    outputs: dict[str, str]


def _steps(recipe: Recipe) -> list[_Step]:
    """Every stage with its identity but for its inputs, worked out once for all runs."""
    return [
        _Step(stage, identity(stage.uses, stage.config, {}), dict(stage.uses.outputs_of(stage.config)))
        for stage in recipe.stages.values()
    ]


def _fill(store: Store, recipe: str, steps: list[_Step], number: int, newest: bool) -> int:
    """Results and records of every stage, as if they had been run; all but the newest run with another seed."""
    outputs: dict[str, dict[str, Artifact]] = {}
    entries: dict[str, Any] = {}
    run = f"run-{number:05d}"
    for step in steps:
        name, uses = step.stage.name, step.stage.uses
        inputs = {key: [_digest(entry, outputs) for entry in entries_] for key, entries_ in step.stage.inputs.items()}
        digests = {key: found if uses.inputs[key].many else found[0] for key, found in inputs.items()}
        config = step.what["config"] if newest else {**step.what["config"], "seed": 1000 + number}
        what = {**step.what, "config": config, "inputs": digests}
        found = {
            output: _artifact(store, kind, f"{run} {name} {output}", what) for output, kind in step.outputs.items()
        }
        outputs[name] = found
        provenance = {"run": run, "recipe": recipe, "stage_name": name, "versions": {"torch": "2"}}
        record = Record(uses.name, fingerprint(what), what, found, {"loss": 0.5}, {"rows": 1}, {}, provenance)
        key = f"index/{uses.name}/{record.fingerprint}/{time.time_ns():020d}-{os.urandom(6).hex()}.json"
        _write(store, key, record.to_bytes())
        _write(store, f"work/{record.fingerprint}/lease.json", seal({"free": True}))
        named = {output: artifact.to_json() for output, artifact in found.items()}
        entries[name] = {"uses": uses.name, "state": "ran", "outputs": named, "metrics": {"loss": 0.5}}
        if newest:
            for alias, target in {name: next(iter(named.values())), **_dotted(name, named)}.items():
                _write(store, f"aliases/{recipe}/{alias}.json", seal({"name": f"{recipe}/{alias}", **target}))
    _write(store, f"runs/{run}.json", seal({"run": run, "recipe": recipe, "state": "ok", "stages": entries}))
    return sum(len(found) for found in outputs.values())


def _digest(reference: Any, outputs: dict[str, dict[str, Artifact]]) -> str:
    return outputs[reference.stage][reference.output].digest


def _dotted(name: str, named: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {f"{name}.{output}": target for output, target in named.items()}


def _artifact(store: Store, kind: str, salt: str, producer: dict[str, Any]) -> Artifact:
    files = {**PAYLOAD, "salt": salt.encode()}
    entries = tuple(FileEntry(path, len(data), sha256_bytes(data)) for path, data in sorted(files.items()))
    manifest = Manifest(kind, entries, producer, {"loss": 0.5}, {"rows": 1}, {"torch": "2"})
    for path, data in files.items():
        _write(store, f"{manifest.artifact.key}/files/{path}", data)
    _write(store, f"{manifest.artifact.key}/manifest.json", manifest.to_bytes())
    return manifest.artifact


def _write(store: Store, key: str, data: bytes) -> None:
    """A file of long ago, without the syncs that a real store does."""
    path = store.files.path(key)  # type: ignore[attr-defined]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    past = os.stat(path).st_mtime - OLD_SECONDS
    os.utime(path, (past, past))


def big_store(folder: Path, artifacts: int, stages: int) -> tuple[Store, Path]:
    """A store with at least so many artifacts, and the file of the recipe whose newest run it holds."""
    store = open_store(str(folder / "store"))
    path = write_recipe(stages, folder)
    recipe = Recipe.load(str(path))
    steps = _steps(recipe)
    count = _fill(store, recipe.name, steps, 0, newest=False)
    for number in range(1, -(-artifacts // count) - 1):
        _fill(store, recipe.name, steps, number, newest=False)
    _fill(store, recipe.name, steps, 99_999, newest=True)
    return store, path
