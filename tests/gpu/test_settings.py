"""Whole stages with every setting that changes what is on the GPU: killed and run again they leave the same bytes, and
where nothing is sampled their first step is that of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from stages.context import Context
from stages.training.loop import Trainer
from tests.stages.interruptions import files_of, killed_in
from tests.stages.resuming import ROWS
from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model
from tests.training.architectures import save_architecture
from tests.training.experts import EXPERTS

STEPS: dict[str, Any] = {"learning_rate": 1e-2, "train_batch_size": 2, "max_steps": 4, "checkpoint_steps": 2}
LORA: dict[str, Any] = {"lora_r": 2, "lora_alpha": 4, "merge_adapters": False}
SAMPLED: dict[str, Any] = {"rewards": ["tests.stages.small_models:letters"], "max_completion_length": 4}
GROUPS: dict[str, Any] = {**SAMPLED, "num_generations": 4, "train_batch_size": 4}
TAUGHT: dict[str, Any] = {**GROUPS, "success_reward_threshold": 0.2, "reprompt_template": "{prompt}{solution}"}
FORM: dict[str, Any] = {"structured": {"regex": "[a-d]{2,4}"}, "temperature": 0.8}

TRAINED: dict[str, dict[str, Any]] = {
    "nf4": {**LORA, "quantization": "nf4", "lora_dropout": 0.2},
    "fp4 in bfloat16": {**LORA, "quantization": "fp4", "bf16": True},
    "int8": {**LORA, "quantization": "int8"},
    "pissa": {**LORA, "init_lora_weights": "pissa_niter_4"},
    "olora in bfloat16": {**LORA, "init_lora_weights": "olora", "bf16": True},
    "dora": {**LORA, "use_dora": True},
    "8 bits": {"optim": "adamw_8bit"},
    "adafactor": {"optim": "adafactor"},
    "muon": {"optim": "muon"},
    "muon in bfloat16": {"optim": "muon", "bf16": True},
    "bfloat16 alone": {"bf16": True, "pure_bf16": True},
    "ema": {"weight_averaging": {"kind": "ema", "update_freq": 1}},
    "bema in bfloat16": {"weight_averaging": {"kind": "bema", "update_freq": 1}, "bf16": True},
    "noise": {"neftune_noise_alpha": 5.0},
}
"""Settings of sft."""
SAMPLING: dict[str, tuple[str, dict[str, Any]]] = {
    "a form": ("rl", {**GROUPS, **FORM}),
    "a quantized policy": ("rl", {**GROUPS, **LORA, "quantization": "int8", "beta": 0.1}),
    "averages that sample": ("rl", {**GROUPS, "weight_averaging": {"kind": "ema", "update_freq": 1}}),
    "ratios of sequences": ("rl", {**GROUPS, "loss_type": "vespo", "entropy_coef": 0.01}),
    "sdpo of likeliest tokens": ("sdpo", {**TAUGHT, "distillation_mode": "topk_logits", "distillation_topk": 3}),
    "sdpo of sampled tokens": ("sdpo", {**TAUGHT, "distillation_mode": "sampled_token"}),
    "iw_opd": ("distill", {"loss_type": "iw_opd", "max_completion_length": 4}),
    "minillm": ("distill", {"loss_type": "minillm", "gamma": 0.9, "max_completion_length": 4}),
    "own completions": ("distill", {"lmbda": 1.0, "max_completion_length": 4}),
    "several teachers": ("distill", {"lmbda": 0.5, "max_completion_length": 4, "teacher_column": "subject"}),
    "ppo": ("ppo", SAMPLED),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    for name, seed in {"model": 1, "teacher": 2, "other": 3}.items():
        save_model(folder / name, seed)
    asking = {"router_aux_loss_coef": 0.02, "output_router_logits": True}
    save_architecture(folder / "experts", "mixtral", EXPERTS["mixtral"] | asking)
    rows = [{**row, "subject": number % 2} for number, row in enumerate(ROWS["prompt_completion"])]
    save_dataset(folder / "rows", "prompt_completion", rows)
    return {path.name: path for path in folder.iterdir()}


def run(stage: str, folder: Path, inputs: dict[str, Any], **settings: Any) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_stage(stage, folder, inputs, **{**STEPS, **settings})


def left(context: Context, settings: dict[str, Any]) -> Path:
    """What it trained: an adapter where it has one."""
    return output(context, "adapter" if "lora_r" in settings else "model")


def first_step(context: Context, settings: dict[str, Any]) -> dict[str, float]:
    return read_lines(left(context, settings) / "metrics.jsonl")[0]


def on_the_cpu(stage: str, folder: Path, inputs: dict[str, Any], **settings: Any) -> Context:
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        found = run(stage, folder, inputs, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def assert_same_again(stage: str, folder: Path, inputs: dict[str, Any], settings: dict[str, Any]) -> Context:
    """Killed before its fourth step, and run again."""
    whole = run(stage, folder / "whole", inputs, **settings)
    with killed_in(Trainer, "step", calls=4):
        run(stage, folder / "again", inputs, **settings)
    again = run(stage, folder / "again", inputs, **settings)
    assert any(event.get("kind") == "resumed" for event in read_lines(folder / "again" / "job" / "events.jsonl"))
    assert files_of(left(again, settings)) == files_of(left(whole, settings))
    return whole


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    settings = TRAINED[name]
    if settings.get("quantization") or settings.get("optim") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    inputs = {"model": made["model"], "dataset": made["rows"]}
    there = first_step(assert_same_again("sft", tmp_path, inputs, settings), settings)
    here = first_step(on_the_cpu("sft", tmp_path / "cpu", inputs, **settings), settings)
    tolerance = 0.05 if settings.get("bf16") else 1e-4
    assert there["loss"] == pytest.approx(here["loss"], rel=tolerance)
    if not settings.get("lora_dropout"):  # whose draws are the device's own
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=2 * tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_experts_are_balanced(bf16: bool, made: dict[str, Path], tmp_path: Path) -> None:
    settings = {"bf16": bf16}
    inputs = {"model": made["experts"], "dataset": made["rows"]}
    there = first_step(assert_same_again("sft", tmp_path, inputs, settings), settings)
    here = first_step(on_the_cpu("sft", tmp_path / "cpu", inputs, **settings), settings)
    for metric in ("loss", "aux_loss", "router/max_load"):
        assert there[metric] == pytest.approx(here[metric], rel=0.1 if bf16 else 1e-4)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Stages that compare sampler and trainer would end where these differ."""
    stage, settings = SAMPLING[name]
    if "structured" in settings:
        pytest.importorskip("llguidance")
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    inputs: dict[str, Any] = {"model": made["model"], "dataset": made["rows"]}
    if stage == "distill":
        inputs["teacher"] = [made["teacher"], made["other"]] if "teacher_column" in settings else made["teacher"]
    context = assert_same_again(stage, tmp_path, inputs, settings)
    metrics = read_lines(left(context, settings) / "metrics.jsonl")
    assert len(metrics) == STEPS["max_steps"] and all(row["grad_norm"] >= 0 for row in metrics)
