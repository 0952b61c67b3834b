"""Runs of `distill` between two tokenizers of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.two_tokenizers import byte_level
from tests.stages.small_models import output, read_lines, save_dataset, save_model
from tests.stages.test_other_engines import done

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
MERGES = ["a b", "d e", "de f", "Ġ a", "c d"]
ROWS = [("abc", "def"), ("hg", "a"), ("ab", "cab hgg"), ("eee", "bad de")]
GIVEN: dict[str, Any] = {
    "max_completion_length": 6,
    "lmbda": 0.0,
    "train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
}


def save_teacher(folder: Path, seed: int = 2, **settings: Any) -> Any:
    """Of another width, with bytes and MERGES for tokens."""
    torch.manual_seed(seed)
    tokenizer = byte_level(MERGES, TEMPLATE, **settings)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def metrics(folder: Path, inputs: dict[str, Path], cross: dict[str, Any] | None, **settings: Any) -> list[Any]:
    context = done("distill", folder, inputs, cross_tokenizer=cross, **{**GIVEN, **settings})
    return read_lines(output(context, "model") / "metrics.jsonl")


@pytest.fixture(name="inputs")
def cross_inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(tmp_path / "student", 1)
    save_teacher(tmp_path / "teacher")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    return {
        "model": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "dataset": save_dataset(tmp_path / "rows", "prompt_completion", rows),
    }


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
