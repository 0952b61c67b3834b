"""Stages on multimodal checkpoints with rows of text: what is written loads by the same class, and what sees stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from tests.data.characters import ids
from tests.stages.small_models import logged, mean_labels_loss, output, read_lines, reward_of, run_stage, save_dataset
from tests.training.multimodal_models import is_beside_text, save

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e")]
SFT: dict[str, Any] = {"learning_rate": 1e-2, "train_batch_size": 3, "max_steps": 2, "max_length": 12}
PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "hh"},
    {"prompt": "da", "chosen": "bbc", "rejected": "e"},
]


def inputs(folder: Path, model: Path) -> dict[str, Path]:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    return {"model": model, "dataset": save_dataset(folder / "rows", "prompt_completion", rows)}


def assert_only_text_changed(before: Path, after: Path) -> None:
    """The same names and files beside weights; other weights of the language model, the very same of the rest."""
    (old, new) = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {name for name in old if is_beside_text(name)} and same
    assert {path.name for path in before.iterdir()} <= {path.name for path in after.iterdir()}


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "smolvlm"])
def test_sft(model_type: str, tmp_path: Path) -> None:
    model = save(tmp_path / "model", model_type)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    has_routers = model_type == "qwen3_vl_moe"
    settings = SFT | ({"router_aux_loss_coef": 1e-3} if has_routers else {})
    context = run_stage("sft", tmp_path / "run", inputs(tmp_path, tmp_path / "model"), **settings)
    made = output(context, "model")
    (said,) = (line for line in logged(tmp_path / "run" / "job") if "is multimodal" in line)
    beside = sum(one.numel() for name, one in model.named_parameters() if is_beside_text(name))
    assert f"the {beside:,} other parameters stay as they are" in said
    metrics = read_lines(made / "metrics.jsonl")
    assert ("aux_loss" in metrics[0]) == has_routers
    balance = 1e-3 * metrics[0].get("aux_loss", 0.0)
    assert metrics[0]["loss"] == pytest.approx(mean_labels_loss(model, ROWS) + balance, rel=1e-5)
    assert_only_text_changed(tmp_path / "model", made)
    again = AutoModelForImageTextToText.from_pretrained(made).eval()
    assert type(again) is type(model) and mean_labels_loss(again, ROWS) < metrics[0]["loss"]


def test_adapters_alone_and_merged(tmp_path: Path) -> None:
    """An adapter's folder on its base is the merged model, whose vision is that of the base."""
    save(tmp_path / "model", "gemma3")
    settings = {**SFT, "lora_r": 4, "lora_alpha": 8}
    given = inputs(tmp_path, tmp_path / "model")
    merged = output(run_stage("sft", tmp_path / "merged", given, **settings), "model")
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", merged))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(".layers." in name and not is_beside_text(name) for name in changed)
    AcceleratorState._reset_state(reset_partial_state=True)
    apart = output(run_stage("sft", tmp_path / "apart", given, **settings, merge_adapters=False), "adapter")
    wired = {"adapter": apart, "base": tmp_path / "model"}
    again = output(run_stage("merge_adapter", tmp_path / "again", wired), "model")
    other = load_file(again / "model.safetensors")
    assert all(torch.equal(other[name], tensor) for name, tensor in new.items())


def test_sft_in_bfloat16_leaves_vision_alone(tmp_path: Path) -> None:
    """Passes have rounded copies; what is written is not rounded where nothing was trained."""
    save(tmp_path / "model", "gemma3")
    made = output(run_stage("sft", tmp_path / "run", inputs(tmp_path, tmp_path / "model"), **SFT, bf16=True), "model")
    assert_only_text_changed(tmp_path / "model", made)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl", "qwen3_5"])
def test_rl_samples_and_trains_on_the_same_numbers(model_type: str, tmp_path: Path) -> None:
    save(tmp_path / "model", model_type)
    settings = {"train_batch_size": 12, "num_generations": 4, "max_completion_length": 6, "max_length": 12}
    reward = {"rewards": ["tests.stages.small_models:letters"], "max_steps": 1, "learning_rate": 1e-3}
    made = run_stage("rl", tmp_path / "run", inputs(tmp_path, tmp_path / "model"), **settings, **reward)
    (row,) = read_lines(output(made, "model") / "metrics.jsonl")
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert_only_text_changed(tmp_path / "model", output(made, "model"))


def test_a_reward_model(tmp_path: Path) -> None:
    """Gemma 3 has a class of it: its own score of a row is the one that the first step's loss is of."""
    save(tmp_path / "model", "gemma3")
    rows = save_dataset(tmp_path / "pairs", "preference", PAIRS)
    settings = {**SFT, "train_batch_size": 2, "max_steps": 1, "learning_rate": 1e-30}
    wired = {"model": tmp_path / "model", "dataset": rows}
    made = output(run_stage("reward_model", tmp_path / "run", wired, **settings), "model")
    model = AutoModelForSequenceClassification.from_pretrained(made).eval()
    margins = [
        reward_of(model, [*ids(pair["prompt"] + pair["chosen"] + "$")])
        - reward_of(model, [*ids(pair["prompt"] + pair["rejected"] + "$")])
        for pair in PAIRS
    ]
    expected = -torch.nn.functional.logsigmoid(torch.tensor(margins)).mean()
    (row,) = read_lines(made / "metrics.jsonl")
    assert row["loss"] == pytest.approx(float(expected), rel=1e-5)
