"""Stages on unusual architectures: a first step whose loss is transformers' own, and an export that loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.stages.small_models import mean_labels_loss, output, read_lines, run_stage, save_dataset
from tests.training.architectures import GATED_NORMS, LLAMA4, MPT, UNBOUNDED_ROWS, save_architecture

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e")]

BOUNDED = {**GATED_NORMS, "llama4_text": LLAMA4}
MODELS = {**BOUNDED, **UNBOUNDED_ROWS, "mpt": MPT}


def trained(folder: Path, model: Path, **config: Any) -> tuple[list[Any], Path]:
    """Metrics and model folder of `sft` on all rows for two steps."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    inputs = {"model": model, "dataset": save_dataset(folder / "rows", "prompt_completion", rows)}
    settings: dict[str, Any] = {"learning_rate": 1e-2, "train_batch_size": 3, "max_steps": 2, "max_length": 12}
    settings["router_aux_loss_coef"] = 0  # what is compared with is without it
    made = output(run_stage("sft", folder, inputs, **(settings | config)), "model")
    return read_lines(made / "metrics.jsonl"), made


@pytest.mark.parametrize("model_type", MODELS)
def test_sft_begins_at_the_models_own_loss_and_lowers_it(model_type: str, tmp_path: Path) -> None:
    model = save_architecture(tmp_path / "model", model_type, MODELS[model_type], bounded=model_type in BOUNDED)
    metrics, made = trained(tmp_path / "run", tmp_path / "model")
    assert metrics[0]["loss"] == pytest.approx(mean_labels_loss(model, ROWS), rel=1e-5)
    assert mean_labels_loss(AutoModelForCausalLM.from_pretrained(made).eval(), ROWS) < metrics[0]["loss"]


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "llama4_text", "bloom", "mamba"])
def test_rl_samples_and_trains_on_the_same_numbers(model_type: str, tmp_path: Path) -> None:
    save_architecture(tmp_path / "model", model_type, MODELS[model_type], bounded=model_type in BOUNDED)
    rows = save_dataset(tmp_path / "rows", "prompt_completion", [{"prompt": p, "completion": ""} for p, _ in ROWS])
    settings = {"train_batch_size": 12, "num_generations": 4, "max_completion_length": 6, "max_length": 12}
    reward = {"rewards": ["tests.stages.small_models:letters"], "max_steps": 1, "learning_rate": 1e-3}
    made = run_stage("rl", tmp_path / "run", {"model": tmp_path / "model", "dataset": rows}, **settings, **reward)
    (row,) = read_lines(output(made, "model") / "metrics.jsonl")
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
