"""Stages with weights in bfloat16 alone: their first step is that of bf16, whose passes use the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.stages.small_models import output, read_lines, run_stage, save_dataset
from tests.stages.test_dropout import ROWS, SFT, STAGES
from tests.training.architectures import save_architecture
from tests.training.experts import EXPERTS

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {name: (name, *found) for name, found in STAGES.items()}
RUNS |= {
    "sft": ("sft", "rows", SFT),
    "best": ("sft", "rows", SFT | {"keep": "best", "eval_steps": 1}),
    "lora": ("sft", "rows", SFT | {"lora_r": 2, "merge_adapters": False}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture of experts, and rows."""
    folder = tmp_path_factory.mktemp("made")
    save_architecture(folder / "model", "mixtral", EXPERTS["mixtral"])
    pairs = [{"prompt": prompt, "chosen": text, "rejected": "hh"} for prompt, text in ROWS]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in ROWS]
    save_dataset(folder / "pairs", "preference", pairs)
    save_dataset(folder / "rows", "prompt_completion", rows)
    return {path.name: path for path in folder.iterdir()}


def trained(run: str, made: dict[str, Path], folder: Path, **changes: Any) -> tuple[list[dict[str, float]], Path]:
    AcceleratorState._reset_state(reset_partial_state=True)
    stage, data, settings = RUNS[run]
    inputs = {"model": made["model"], "dataset": made[data]}
    if stage == "distill":
        inputs["teacher"] = made["model"]
    if "eval_steps" in settings:
        inputs["eval_dataset"] = made["rows"]
    context = run_stage(stage, folder, inputs, **(settings | {"bf16": True} | changes))
    made_folder = output(context, "adapter" if run == "lora" else "model")
    return read_lines(made_folder / "metrics.jsonl"), made_folder


@pytest.mark.parametrize("run", RUNS)
def test_the_first_step_is_that_of_bf16_and_the_output_is_bfloat16(
    run: str, made: dict[str, Path], tmp_path: Path
) -> None:
    masters, _ = trained(run, made, tmp_path / "masters")
    pure, folder = trained(run, made, tmp_path / "pure", pure_bf16=True)
    assert pure[0]["loss"] == masters[0]["loss"]
    assert pure[0]["grad_norm"] == pytest.approx(masters[0]["grad_norm"], rel=0.05, abs=1e-6)
    (written,) = folder.glob("*.safetensors")
    tensors = load_file(written)
    assert tensors
    for tensor in tensors.values():
        assert torch.equal(tensor.float(), tensor.bfloat16().float())
