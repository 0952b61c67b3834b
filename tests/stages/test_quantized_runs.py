"""Whole stages on a quantized base, on a CPU: taken up where they were killed, and written in full precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError
from stages.context import Context
from stages.training.loop import Trainer
from stages.training.model import load_causal_lm
from stages.training.quantization import dequantized, is_quantized, quantized
from tests.stages.interruptions import files_of, killed_in
from tests.stages.resuming import LORA, ROWS, Case, run_on_adapters, save_inputs
from tests.stages.small_models import logged, output, read_lines, run_stage, save_dataset

RATE = {"learning_rate": 1e-2}
CASES: dict[str, Case] = {
    "nf4": ("sft", "prompt_completion", {"quantization": "nf4", "lora_dropout": 0.2}),
    "fp4": ("preference", "triple_preference", {"quantization": "fp4", "bf16": True}),
    "reward": ("reward_model", "triple_preference", {"quantization": "nf4", "center_rewards_coefficient": 0.1}),
    "steps": ("process_reward_model", "stepwise_supervision", {"quantization": "int8"}),
    "int8": (
        "rl",
        "prompt_completion",
        {
            "quantization": "int8",
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


def train(case: str, folder: Path, made: dict[str, Path], **more: Any) -> Context:
    inputs = {"model": more.pop("model")} if "model" in more else {}
    return run_on_adapters(CASES[case], folder, made, RATE | more, **inputs)


@pytest.mark.parametrize("case", CASES)
def test_interrupted_training_ends_with_the_same_bits(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    whole = train(case, tmp_path / "whole", made, checkpoint_steps=2)
    with killed_in(Trainer, "step", calls=4):
        train(case, tmp_path / "again", made, checkpoint_steps=2)
    again = train(case, tmp_path / "again", made, checkpoint_steps=2)
    events = read_lines(tmp_path / "again" / "job" / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "resumed"][-1] == 2
    assert files_of(output(again, "model")) == files_of(output(whole, "model"))
    # beside the adapters' layers nothing of the input is changed, and nothing is of few bits
    base, trained = (load_file(one / "model.safetensors") for one in (made["model"], output(whole, "model")))
    changed = {
        name for name, tensor in trained.items() if not name.startswith("score.") and not tensor.equal(base[name])
    }
    assert len(changed) == 14 and all("_proj" in name for name in changed)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_the_adapter_is_written_and_goes_on(made: dict[str, Path], tmp_path: Path) -> None:
    """Merged it is the full base with what it learnt on the quantized one, and it is trained on where it stopped."""
    merged = output(train("nf4", tmp_path / "merged", made, lora_dropout=0.0), "model")
    apart = output(train("nf4", tmp_path / "apart", made, lora_dropout=0.0, merge_adapters=False), "adapter")
    tensors, base, found = (
        load_file(path)
        for path in (
            apart / "adapter_model.safetensors",
            made["model"] / "model.safetensors",
            merged / "model.safetensors",
        )
    )
    for name in (name for name in base if "_proj" in name):
        low, high = (
            tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in ("A", "B")
        )
        torch.testing.assert_close(found[name], base[name] + 2 * high @ low, atol=1e-6, rtol=1e-6)
        assert high.abs().max() > 1e-3


def quantized_loss(folder: Path, kind: str, rows: list[tuple[list[int], list[int]]]) -> float:
    """A mean over tokens by transformers, of the full model with the weights that those of few bits stand for."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    low = load_causal_lm(folder, **quantized(kind, torch.device("cpu")))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for name, layer in low.named_modules():
            if is_quantized(layer):
                model.get_submodule(name).weight.copy_(dequantized(layer))
        for prompt, completion in rows:
            logits_TV = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            total -= float(logits_TV.log_softmax(-1)[range(len(completion)), completion].sum())
            tokens += len(completion)
    return total / tokens


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_first_loss_is_that_of_the_weights_of_few_bits(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    from tests.data.characters import ids

    rows = [(ids(row["prompt"]), ids(f"{row['completion']}$")) for row in ROWS["prompt_completion"]]
    settings = {"train_batch_size": 4, "max_steps": 1, "lora_dropout": 0.0}
    context = train("nf4", tmp_path / "run", made, quantization=kind, **settings)
    (first,) = read_lines(output(context, "model") / "metrics.jsonl")
    assert first["loss"] == pytest.approx(quantized_loss(made["model"], kind, rows), rel=1e-5)
    plain = train("nf4", tmp_path / "plain", made, quantization=None, **settings)
    assert abs(read_lines(output(plain, "model") / "metrics.jsonl")[0]["loss"] - first["loss"]) > 1e-3


def test_the_reference_is_the_quantized_base(made: dict[str, Path], tmp_path: Path) -> None:
    """The policy begins at it; one that is wired in is not of few bits, and that is said."""
    first, *_, last = read_lines(output(train("fp4", tmp_path / "run", made, bf16=False), "model") / "metrics.jsonl")
    assert (first["rewards/margins"], first["loss"]) == (0, pytest.approx(math.log(2)))
    assert abs(last["rewards/margins"]) > 1e-4
    stage, rows, settings = CASES["fp4"]
    inputs = {"model": made["model"], "dataset": made[rows], "reference": made["model"]}
    wired = run_stage(stage, tmp_path / "wired", inputs, **{**LORA, **RATE, **settings, "bf16": False})
    assert read_lines(output(wired, "model") / "metrics.jsonl")[0]["rewards/margins"] != 0
    assert any(
        line.startswith("input reference is of weights in full precision")
        for line in logged(tmp_path / "wired" / "job")
    )


def test_the_model_in_full_precision_as_its_own_teacher_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    """Of distill, whose teacher is a model of its own; sdpo's is the policy as it came, quantized with it."""
    rows = [{"prompt": "ab", "privileged_context": "c"}, {"prompt": "cd", "privileged_context": "e"}]
    dataset = save_dataset(tmp_path / "rows", "privileged_context", rows)
    settings = {**LORA, **RATE, "max_steps": 1, "quantization": "nf4", "max_completion_length": 4}
    run_stage("distill", tmp_path / "run", {"model": made["model"], "dataset": dataset}, **settings)
    (said,) = [line for line in logged(tmp_path / "run" / "job") if line.startswith("the teacher is input model")]
    assert "starts from those of nf4" in said


def test_quantization_is_of_frozen_weights(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization is of the frozen weights under LoRA adapters; give lora_r too"):
        train("reward", tmp_path / "reward", made, lora_r=None, lora_alpha=32)
    with pytest.raises(StageError, match="quantization is nf4, but there are no adapters"):
        train("nf4", tmp_path / "run", made, lora_r=None, lora_alpha=32, lora_dropout=0.0)
