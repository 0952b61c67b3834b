"""A recipe of the real stages in a fifth of a second: rows normalized, six steps of sft with adapters, dropout and two
checkpoints, an evaluation by loss and by completions. Its stages read and write their store as any do.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import stages.__main__
from flows.recipe import Recipe
from stages.spec import Spec

ROWS = [
    {"prompt": "abc", "completion": "de"},
    {"prompt": "da", "completion": "bbcaaa"},
    {"prompt": "hgf", "completion": "e"},
    {"prompt": "cab", "completion": "aabbcc"},
]
TRAINING = {
    "learning_rate": 1e-2,
    "train_batch_size": 3,
    "max_steps": 6,
    "checkpoint_steps": 2,
    "lora_r": 2,
    "lora_dropout": 0.5,
}
EVALUATING = {
    "tasks": ["loss", "accuracy"],
    "rewards": ["tests.stages.small_models:letters"],
    "max_completion_length": 3,
    "temperature": 1.0,
}


@contextlib.contextmanager
def miniature() -> Iterator[Recipe]:
    """The recipe, whose model and rows lie in a folder for as long as the block runs."""
    from tests.stages.small_models import save_model

    run_spec = stages.__main__.run_spec
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model", seed=1)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        with mock.patch.object(stages.__main__, "run_spec", lambda spec: _as_a_process(run_spec, spec)):
            yield Recipe.from_dict(_recipe(folder))


def _as_a_process(run_spec: Any, spec: Spec) -> None:
    """What accelerate keeps of a stage ends with its process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    run_spec(spec)


def _recipe(folder: Path) -> dict[str, Any]:
    source = {"path": str(folder / "rows.jsonl")}
    return {
        "name": "miniature",
        "launch": {"threads": 1},
        "stages": {
            "rows": {"uses": "normalize", "with": {"source": source, "type": "prompt_completion"}},
            "sft": {"uses": "sft", "inputs": {"model": str(folder / "model"), "dataset": "rows"}, "with": TRAINING},
            "score": {"uses": "evaluate", "inputs": {"model": "sft", "dataset": "rows"}, "with": EVALUATING},
        },
    }
