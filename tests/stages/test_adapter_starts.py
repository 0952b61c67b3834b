"""Stages whose adapters start as a part of the weights: their reference, how they are taken up, what they leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError
from stages.context import Context, local_context
from stages.training.loop import Trainer
from tests.stages.interruptions import files_of, killed_in
from tests.stages.resuming import LORA, Case, run_on_adapters, save_inputs
from tests.stages.small_models import output, read_lines, run_stage

RATE = {"learning_rate": 5e-3}
CASES: dict[str, Case] = {
    "sft": ("sft", "prompt_completion", {"init_lora_weights": "olora", "bf16": True, "loraplus_lr_ratio": 4}),
    "preference": ("preference", "triple_preference", {"init_lora_weights": "pissa", "layers_to_transform": [1]}),
    "rl": (
        "rl",
        "prompt_completion",
        {
            "init_lora_weights": "pissa_niter_4",
            "rank_pattern": {"q_proj": 4},
            "rewards": ["tests.stages.small_models:letters"],
            "num_generations": 2,
            "max_completion_length": 4,
            "beta": 0.1,
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_inputs(tmp_path_factory.mktemp("made"))


def train(case: str, folder: Path, made: dict[str, Path], *inputs: str, **more: Any) -> Context:
    """`inputs`: those that are the model as it came."""
    return run_on_adapters(CASES[case], folder, made, RATE | more, **dict.fromkeys(inputs, made["model"]))


def metrics(context: Context, name: str = "model") -> list[dict[str, float]]:
    return read_lines(output(context, name) / "metrics.jsonl")


@pytest.mark.parametrize("case", CASES)
def test_interrupted_training_ends_with_the_same_bits(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    whole = train(case, tmp_path / "whole", made, checkpoint_steps=2)
    with killed_in(Trainer, "step", calls=4):
        train(case, tmp_path / "again", made, checkpoint_steps=2)
    again = train(case, tmp_path / "again", made, checkpoint_steps=2)
    assert files_of(output(again, "model")) == files_of(output(whole, "model"))


@pytest.mark.parametrize("case", ["preference", "rl"])
def test_the_reference_is_the_model_as_it_came(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    """All metrics of all steps as with that model wired in, and at the first step the policy is it."""
    implicit, wired = (
        metrics(train(case, tmp_path / name, made, *inputs)) for name, inputs in (("a", ()), ("b", ("reference",)))
    )
    for one, other in zip(implicit, wired, strict=True):
        if one["step"] == 1 and case == "preference":  # the sign of a margin that is 0 but for rounding
            one["rewards/accuracies"] = other["rewards/accuracies"]
        assert one == pytest.approx(other, abs=5e-5, rel=5e-4)
    if case == "preference":
        assert implicit[0]["rewards/margins"] == 0 and implicit[0]["loss"] == pytest.approx(math.log(2))
        assert abs(implicit[-1]["rewards/margins"]) > 1e-4
    else:
        assert implicit[0]["kl"] == pytest.approx(0, abs=1e-7)
        assert implicit[-1]["kl"] > 1e-6


def test_an_orthogonal_start_in_bfloat16_is_its_own_reference(made: dict[str, Path], tmp_path: Path) -> None:
    """Its rounded factors have a product, which is no step away from anything."""
    settings = {"init_lora_weights": "orthogonal", "layers_to_transform": None, "lora_alpha": 64, "bf16": True}
    first, *_, last = metrics(train("preference", tmp_path, made, **settings))
    assert (first["rewards/margins"], first["loss"]) == (0, pytest.approx(math.log(2)))
    assert abs(last["rewards/margins"]) > 1e-4


def test_lora_plus_on_an_adapter_that_came(made: dict[str, Path], tmp_path: Path) -> None:
    """AdamW's first step is the learning rate in every direction, and 4 times that for B. Without adapters there is
    none of it."""
    came = output(train("sft", tmp_path / "came", made, merge_adapters=False, init_lora_weights="default"), "adapter")
    settings: dict[str, Any] = {**LORA, **RATE, "max_steps": 1, "weight_decay": 0.0, "merge_adapters": False}
    settings = {name: value for name, value in settings.items() if not name.startswith("lora_")}
    wired = {"model": came, "dataset": made["prompt_completion"]}
    AcceleratorState._reset_state(reset_partial_state=True)
    store = str(tmp_path / "came" / "store")  # where its base is kept
    config = {**settings, "loraplus_lr_ratio": 4}
    context = local_context("sft", config, folder=tmp_path / "went", inputs=dict(wired), store=store)
    context.stage.run(context)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (came, output(context, "adapter")))
    for name, tensor in after.items():
        rate = 2e-2 if ".lora_B." in name else 5e-3
        assert (tensor - before[name]).abs().max() == pytest.approx(rate, rel=1e-2)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(StageError, match=r"loraplus_lr_ratio is 4\.0, but there are no adapters"):
        run_stage("sft", tmp_path / "whole", {**wired, "model": made["model"]}, max_steps=1, loraplus_lr_ratio=4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 13)[None]).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_it_leaves_is_of_the_model_as_it_came(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Merged, beside the merged weights, and alone: peft puts either adapter on the input model. Nothing else moves."""
    whole = output(train(case, tmp_path / "whole", made), "model")
    apart = output(train(case, tmp_path / "apart", made, merge_adapters=False), "adapter")
    expected = logits(AutoModelForCausalLM.from_pretrained(whole))
    for folder in (whole / "adapter", apart):
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        base = AutoModelForCausalLM.from_pretrained(made["model"])
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder)), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(made["model"]))).abs().max() > 1e-3
    base, trained = (load_file(folder / "model.safetensors") for folder in (made["model"], whole))
    changed = {name for name, tensor in trained.items() if not tensor.equal(base[name])}
    assert len(changed) == (7 if case == "preference" else 14) and all("_proj" in name for name in changed)
    if case == "preference":
        assert all(".layers.1." in name for name in changed)
