"""SFT, DPO, KTO and GRPO on one adapter after the other, and on fresh ones; run once, looked at by several tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from stages.context import local_context
from tests.in_process import Payload, failures, run_here
from tests.tiny_recipe import artifact_folder, write_recipe

LORA = {"lora_r": 4, "lora_alpha": 8}
TRAINING: dict[str, Any] = {"learning_rate": 5e-3, "train_batch_size": 8, "max_length": 48, "max_steps": 3}
ROLLOUTS = {"num_generations": 4, "max_completion_length": 5, "rewards": ["task.py:length"], "beta": 0.3}
APART = {"merge_adapters": False}


def on(uses: str, model: str, dataset: str, inputs: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    wired = {"model": model, "dataset": dataset, **(inputs or {})}
    return {"uses": uses, "inputs": wired, "with": {**TRAINING, **config}}


def merge(adapter: str) -> dict[str, Any]:
    return {"uses": "merge_adapter", "inputs": {"adapter": adapter}}


def scores(model: str) -> dict[str, Any]:
    inputs = {"model": model, "dataset": "pairs"}
    return {"uses": "reference_logprobs", "inputs": inputs, "with": {"max_length": 48, "per_token": True}}


CHAIN: dict[str, Any] = {
    "sft": on("sft", "base", "rows", **LORA, **APART, lora_dropout=0.1),
    "sft_merged": merge("sft"),
    "sft_scores": scores("sft"),
    "merged_scores": scores("sft_merged"),
    "dpo": on("preference", "sft", "pairs", **APART, lora_dropout=0.1),
    "dpo_merged": merge("dpo"),
    "dpo_wired": on("preference", "sft", "pairs", {"reference": "sft_merged"}, **APART, lora_dropout=0.1),
    "dpo_fresh": on("preference", "sft_merged", "pairs", **LORA),
    "dpo_fresh_wired": on("preference", "sft_merged", "pairs", {"reference": "sft_merged"}, **LORA),
    "kto": on("unpaired_preference", "sft", "pairs", **APART),
    "kto_wired": on("unpaired_preference", "sft", "pairs", {"reference": "sft_merged"}, **APART),
    "grpo": on("rl", "dpo", "rows", **ROLLOUTS),
    "grpo_wired": on("rl", "dpo", "rows", {"reference": "dpo_merged"}, **ROLLOUTS),
    "grpo_fresh": on("rl", "dpo_merged", "rows", **ROLLOUTS, **LORA),
    "grpo_fresh_wired": on("rl", "dpo_merged", "rows", {"reference": "dpo_merged"}, **ROLLOUTS, **LORA),
}


class Chain:
    """A finished run of all of it."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.recipe = write_recipe(folder / "recipe", CHAIN)
        self.payload: Payload = run_here(self.recipe, self.store)
        assert self.payload["state"] == "ok", failures(self.payload)

    def id(self, stage: str, output: str | None = None) -> str:
        outputs = self.payload["stages"][stage]["outputs"]
        return str(outputs[output or next(iter(outputs))]["id"])

    def folder(self, stage: str, output: str | None = None) -> Path:
        return artifact_folder(self.store, self.id(stage, output))

    def metrics(self, stage: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder(stage) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Made once a session."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def run_on_chain(tmp_path: Path, chain: Chain) -> Callable[..., Path]:
    """A stage in this process, on the store of the chain; gives the folder of its outputs. Leaves nothing to take up
    unless it is interrupted."""

    def run(stage: str, inputs: dict[str, Path], name: str = "run", **config: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        context = local_context(stage, config, folder=tmp_path / name, inputs=dict(inputs), store=str(chain.store))
        context.stage.run(context)
        context.checkpoints.clear()
        context.shards.clear()
        return tmp_path / name / "job" / "out"

    return run
