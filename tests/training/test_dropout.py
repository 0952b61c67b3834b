"""Dropout off: a training pass is the pass of evaluation, bit for bit, wherever the noise comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.sft import Config
from stages.training.adapters import add_adapters
from stages.training.dropout import restore_settings, without_dropout
from tests.training.conftest import tiny_model

NOISY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {"attention_dropout": 0.3},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3, "attention_dropout": 0.1},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "attn_pdrop": 0.2},
    "persimmon": {"attention_dropout": 0.2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    "bloom": {"n_head": 4, "n_layer": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
}
"""Modules, functions with an attribute or the configuration's value, dropped layers, jitter of a router."""


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", NOISY)
def test_a_training_pass_is_without_noise(model_type: str) -> None:
    model = tiny_model(model_type, **NOISY[model_type])
    expected = logits(model.eval())
    assert not torch.equal(logits(model.train()), expected)
    found = without_dropout(model)
    assert found and all(value > 0 for value in found.values())
    assert all(torch.equal(logits(model.train()), expected) for _ in range(5))


def test_what_a_router_chooses_by_stays() -> None:
    """PhiMoE's threshold is called jitter and is no noise: experts near the best share its weight."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.9, "input_jitter_noise": 0.1}
    model = tiny_model("phimoe", **settings).eval()
    expected = logits(model)
    assert without_dropout(model).keys() >= {"input_jitter_noise"}
    assert torch.equal(logits(model), expected)


def test_dropout_of_adapters_stays() -> None:
    model: Any = tiny_model("llama", attention_dropout=0.3)
    without_dropout(model)
    adapted = add_adapters(model, Config(lora_r=2, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.equal(logits(adapted.train()), logits(adapted.eval()))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral"])
def test_what_is_written_asks_for_it_again(model_type: str, tmp_path: Path) -> None:
    """The same file as without all this."""
    model: Any = tiny_model(model_type, **NOISY[model_type])
    model.save_pretrained(tmp_path / "before")
    without_dropout(model)
    restore_settings(model, tmp_path / "before")
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "config.json").read_bytes() == (tmp_path / "before" / "config.json").read_bytes()
