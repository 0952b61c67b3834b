"""Rows, models and settings of short trainings that are interrupted and taken up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from stages.context import Context, local_context
from stages.training import export as exporting
from stages.training.checkpoint import Progress, Saver
from stages.training.loop import Trainer
from tests.stages.interruptions import assert_same, killed_in
from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model

Case = tuple[str, str, dict[str, Any]]
"""(stage, type of rows, settings)"""

STEPS = 6
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "train_batch_size": 3, "max_steps": STEPS, "checkpoint_steps": 2}
LORA: dict[str, Any] = {"lora_r": 2, "lora_alpha": 4, "train_batch_size": 2, "max_steps": 4}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt_completion": [
        {"prompt": "abc", "completion": "de", "w": 1.0},
        {"prompt": "da", "completion": "bbcaaa", "w": 3.0},
        {"prompt": "hgf", "completion": "e", "w": 0.5},
        {"prompt": "cab", "completion": "aabbcc", "w": 2.0},
    ],
    "triple_preference": [
        {"prompt": "abc", "chosen": "de", "rejected": "fghab", "reference": "aa", "margin": 0.5},
        {"prompt": "da", "chosen": "bbc", "rejected": "c", "reference": "bcd", "margin": 1.0},
        {"prompt": "hgf", "chosen": "e", "rejected": "dd", "reference": "e", "margin": 0.0},
        {"prompt": "cab", "chosen": "aabb", "rejected": "ha", "reference": "ffg", "margin": 2.0},
    ],
    "unpaired_preference": [
        {"prompt": "abc", "completion": "de", "label": True},
        {"prompt": "da", "completion": "bbc", "label": False},
        {"prompt": "hgf", "completion": "e", "label": True},
        {"prompt": "cab", "completion": "ha", "label": False},
        {"prompt": "cab", "completion": "aabb", "label": True},
    ],
    "privileged_context": [
        {"prompt": "abc", "privileged_context": "de"},
        {"prompt": "da", "privileged_context": "bbcaaa"},
        {"prompt": "hgf", "privileged_context": "e"},
        {"prompt": "cab", "privileged_context": "aabbcc"},
    ],
    "stepwise_supervision": [
        {"prompt": "abc", "completions": ["de", "f"], "labels": [True, False]},
        {"prompt": "da", "completions": ["bbc", "aa", "e"], "labels": [True, True, True]},
        {"prompt": "gf", "completions": ["e"], "labels": [False]},
        {"prompt": "cab", "completions": ["aab", "ff"], "labels": [False, False]},
    ],
}
PAIRS = "triple_preference"


def save_inputs(folder: Path) -> dict[str, Path]:
    """A model, the rows of every type, and rewarded completions of the prompts."""
    save_model(folder / "model", seed=1)
    save_model(folder / "value_model", seed=2, reward=True)
    rewards = {"prompt_row_id": "r0", "reward": 1.0}, {"prompt_row_id": "r1", "reward": 2.0}
    samples = [{"prompt": "", "completion": "a", **one} for one in (*rewards, {"prompt_row_id": "r3", "reward": 0.5})]
    return {
        "model": folder / "model",
        "samples": save_dataset(folder / "samples", "prompt_completion", samples),
        "value_model": folder / "value_model",
        **{kind: save_dataset(folder / kind, kind, rows) for kind, rows in ROWS.items()},
    }


def context_of(
    case: Case, folder: Path, made: dict[str, Path], more: Mapping[str, Any] = MappingProxyType({})
) -> Context:
    """`more`: settings beside the case's, or in their place."""
    stage, rows, settings = case
    settings = {**settings, **more}
    inputs: dict[str, Any] = {"model": made["model"], "dataset": made[rows]}
    if stage == "a2po":
        inputs["samples"] = made["samples"]
    if settings.get("eval_steps"):
        inputs["eval_dataset"] = made[rows]
    if "save_value_model" in settings:
        inputs["value_model"] = made["value_model"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return local_context(stage, TRAINING | settings, folder=folder, inputs=inputs)


def run(context: Context) -> Context:
    context.stage.run(context)
    return context


def run_on_adapters(
    case: Case, folder: Path, made: dict[str, Path], settings: Mapping[str, Any], **inputs: Path
) -> Context:
    """A few steps on adapters. `settings`: beside the case's, or in their place; `inputs`: beside model and rows, or in
    their place."""
    AcceleratorState._reset_state(reset_partial_state=True)
    stage, rows, own = case
    wired = {"model": made["model"], "dataset": made[rows], **inputs}
    return run_stage(stage, folder, wired, **{**LORA, **own, **settings})


@contextmanager
def saved_states_stay() -> Iterator[None]:
    """A thread writes a state while training goes on: what was given away for saving must not change with it."""
    original, given = Saver.save, []

    def save(self: Saver, progress: Progress, waited_seconds: float) -> None:
        given.append((progress.windows, json.dumps(progress.windows)))
        original(self, progress, waited_seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save)
        yield
    assert given and all(json.dumps(state) == text for state, text in given)


def interrupt_thrice(folder: Path, made: dict[str, Path], case: Case) -> None:
    """Killed between two states, at a state, and while the model is written: the bytes of a whole run."""
    with saved_states_stay():
        whole = run(context_of(case, folder / "whole", made))
    with killed_in(Trainer, "step", calls=4):
        run(context_of(case, folder / "killed", made))
    again = context_of(case, folder / "killed", made)
    with killed_in(Trainer, "step", calls=3):
        run(again)
    assert again.resumed_from == 2
    again = context_of(case, folder / "killed", made)
    with killed_in(exporting, "write_jsonl", calls=2):
        run(again)
    assert again.resumed_from == 4
    last = run(context_of(case, folder / "killed", made))
    steps = [row["step"] for row in read_lines(output(last, "model") / "metrics.jsonl")]
    assert last.resumed_from == 4 and [step for step in steps if step] == list(range(1, STEPS + 1))
    for name in last.stage.outputs_of(last.config):
        assert_same(last, whole, name)
