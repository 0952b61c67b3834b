"""What every stage makes of a fixed input, so that behaviour cannot change under an unchanged `version`.

Weights differ in their last bits between kinds of CPU, so nothing is hashed that follows from them bit by bit:
words, ids and counts are compared exactly, and of every float field the weighted mean, to a thousandth. (Checked
with PyTorch's kernels for AVX-512, AVX2 and none: they agree to the fifth digit.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from artifacts import canonical_json, open_store, sha256_bytes
from flows.recipe import Recipe
from stages.identity import semantic_config
from stages.stage import STAGES, load_stage
from tests.every_stage import Done, local_run  # noqa: F401
from tests.stages.golden_values import GOLDEN

RELATIVE, ABSOLUTE = 1e-3, 1e-6
_READ = (
    "contamination.json",
    "pairs.jsonl",
    "ledger.json",
    "dataset.json",
    "results.json",
    "verdict.json",
    "metrics.jsonl",
    "steps.jsonl",
    "samples.jsonl",
    "head.json",
)


def contents(folder: Path) -> dict[str, Any]:
    """File -> what it says as JSON values, without what the libraries that wrote it decide."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            found[path.stem] = parquet.read_table(path).to_pylist()
        elif path.suffix == ".jinja":
            found[path.stem] = path.read_text()
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as weights:
                shapes = {name: list(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}
                squares = sum(float((weights.get_tensor(name).astype("float64") ** 2).sum()) for name in shapes)
            found[path.stem if "weights" in found else "weights"] = {"shapes": shapes, "norm": math.sqrt(squares)}
        elif path.name in _READ:
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[path.stem] = [json.loads(line) for line in lines]
    return found


def without_floats(value: Any) -> Any:
    """The value with null for every float."""
    if isinstance(value, dict):
        return {key: without_floats(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_floats(entry) for entry in value]
    return None if isinstance(value, float) else value


def floats(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """(field, value) of every float; the entries of a list share their list's name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from floats(entry, f"{name}: {key}")
    elif isinstance(value, list):
        for entry in value:
            yield from floats(entry, name)
    elif isinstance(value, float):
        yield name, value


def weighted_means(value: dict[str, Any]) -> dict[str, float]:
    """Field -> mean of x_i * (1 + i / n): a changed sign or order shows, and advantages do not cancel out."""
    fields: dict[str, list[float]] = {}
    for file, entry in value.items():
        for name, number in floats(entry, file):
            fields.setdefault(name, []).append(number)
    return {
        name: sum(number * (1 + i / len(numbers)) for i, number in enumerate(numbers)) / len(numbers)
        for name, numbers in fields.items()
    }


def short(value: Any) -> str:
    """A digest that fits on a line."""
    return sha256_bytes(canonical_json(value))[:16]


def observed(run: Done, name: str) -> tuple[int, str, str, dict[str, float]]:
    """What the run made of a stage, as GOLDEN has it; what it hands on stands there already, as another one's."""
    store, entry = open_store(str(run.store)), run.payload["stages"][name]
    stage = Recipe.load(str(run.recipe)).stages[name]
    given = {found["id"] for other in stage.needs for found in run.payload["stages"][other]["outputs"].values()}
    made = {
        f"{output}/{file}": content
        for output, found in entry["outputs"].items()
        if found["id"] not in given
        for file, content in contents(store.materialize(store.find(found["id"]))).items()
    }
    config = semantic_config(stage.config)
    means = {field: float(f"{mean:.5g}") for field, mean in weighted_means(made).items()}
    return load_stage(entry["uses"]).version, short(config), short(without_floats(made)), means


def test_there_is_a_golden_run_of_every_stage(local_run: Done) -> None:  # noqa: F811
    """But of the one that makes nothing here."""
    assert {local_run.payload["stages"][name]["uses"] for name in GOLDEN} == set(STAGES) - {"push_to_hub"}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(local_run: Done, name: str) -> None:  # noqa: F811
    now, (version, config, exact, means) = observed(local_run, name), GOLDEN[name]
    stage = local_run.payload["stages"][name]["uses"]
    update = f"put this into GOLDEN:\n    {name!r}: {now!r},"
    assert now[0] == version, f"the version of stage {stage} was raised; {update}"
    assert now[1] == config, (
        f"the configuration of stage {stage} has other fields or defaults. Fingerprints follow by themselves, so no "
        f"version need be raised; if it is meant, {update}"
    )
    changed = [] if now[2] == exact else ["words, ids or counts"]
    changed += [
        field
        for field in {**means, **now[3]}
        if not math.isclose(now[3].get(field, math.inf), means.get(field, 0.0), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    ]
    assert not changed, (
        f"stage {stage} gives something else for the same input ({', '.join(changed)}), or something before it "
        f"does. If that is meant, raise `version` of the first stage that changed, and {update}"
    )
