"""A tiny task and recipe for tests that run whole stages in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifacts import open_store

TASK = """
def rows():
    for left in range(12):
        for right in range(10):
            yield {"prompt": f"{left}+{right}=", "completion": str(left + right), "answer": str(left + right)}


def pairs():
    for left in range(12):
        for right in range(10):
            yield {"prompt": f"{left}+{right}=", "chosen": str(left + right), "rejected": f"{left + right}0"}


def length(completions, **_):
    return [len(completion) / 4 for completion in completions]
"""

BASE: dict[str, Any] = {
    "rows": {"uses": "normalize", "with": {"source": {"function": "task.py:rows"}, "type": "prompt_completion"}},
    "pairs": {"uses": "normalize", "with": {"source": {"function": "task.py:pairs"}, "type": "preference"}},
    "base": {
        "uses": "init_model",
        "inputs": {"dataset": "rows"},
        "with": {
            "architecture": "llama",
            "tokenizer": "characters",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    },
}


def write_recipe(folder: Path, stages: dict[str, Any], **launch: Any) -> Path:
    """A recipe of `rows`, `pairs`, `base` and the given stages, one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(TASK)
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({"name": "tiny", "launch": {"threads": 1, **launch}, "stages": BASE | stages}))
    return path


def artifact_folder(store: Path | str, identifier: str) -> Path:
    """The files of an artifact."""
    opened = open_store(str(store))
    return opened.materialize(opened.find(identifier))


def metrics_of(store: Path | str, entry: dict[str, Any]) -> list[dict[str, float]]:
    """Rows of metrics.jsonl of a stage's model."""
    folder = artifact_folder(store, entry["outputs"]["model"]["id"])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
