"""Stages whose completions vLLM samples: in process and by a server that the stage starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from accelerate.state import AcceleratorState

from stages.context import local_context
from tests.stages.small_models import output, read_lines, rows_of, save_dataset
from tests.vllm.models import save_model

PROMPTS = [{"prompt": prompt, "completion": ""} for prompt in ("abc", "da", "hgf", "cab")]
SETTINGS: dict[str, dict[str, Any]] = {
    "rl": {"num_generations": 4, "temperature": 0.9},
    "ppo": {"num_ppo_epochs": 2},
}


def saved(folder: Path, *, tied: bool) -> dict[str, Path]:
    save_model(folder / "policy", 1, tied=tied)
    return {"model": folder / "policy", "dataset": save_dataset(folder / "rows", "prompt_completion", PROMPTS)}


def settings_of(stage: str, engine: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Three steps of 16 completions; every sync is proved."""
    return {
        "rewards": ["tests.stages.small_models:letters"],
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "train_batch_size": 16,
        "max_steps": 3,
        "rollouts": {"kv_cache_gib": 0.05, "proof_interval": 1, **engine},
        **SETTINGS[stage],
        **more,
    }


def trained(
    stage: str, inputs: dict[str, Path], folder: Path, engine: dict[str, Any], **more: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run whose every sync is proved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    context = local_context(stage, settings_of(stage, engine, **more), folder=folder, inputs=dict(inputs))
    with context.resources:
        context.stage.run(context)
    return read_lines(output(context, "model") / "metrics.jsonl"), rows_of(output(context, "rollouts"))


@pytest.mark.parametrize("lora_r", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_in_process(tied: bool, lora_r: int | None, in_process: Callable[..., Any]) -> None:
    """Every token's log-probability is the trainer's, at every step: of tied and untied heads, all weights and LoRA."""
    metrics, rollouts = in_process(tied, lora_r)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics)
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in metrics)
    assert [row["weight_version"] for row in rollouts[::16]] == [0, 1, 2]
    assert all(row["weight_versions"] == [row["weight_version"]] * len(row["token_ids"]) for row in rollouts)


def test_ppo_in_process(tmp_path: Path) -> None:
    """Two steps a generation; it keeps the mean of the differences alone."""
    metrics, rollouts = trained("ppo", saved(tmp_path / "inputs", tied=True), tmp_path, {"engine": "vllm"})
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in metrics)
    assert [row["weight_version"] for row in rollouts[::16]] == [0, 2]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes with an argument or a working directory inside the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (
                any(str(folder) in part for part in process.cmdline()) or process.cwd().startswith(str(folder))
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found
