"""Weights on their way to an engine: peft's own merge, bit for bit, and the model unchanged."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from stages.training.whole_weights import whole_weights

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "head trained whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding adapted": {"target_modules": ["embed_tokens", "o_proj"]},
}


def llama(tied: bool = False) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_and_always_a_head(tied: bool) -> None:
    model = llama(tied)
    found = dict(whole_weights(model))
    assert found.keys() == model.state_dict().keys() and "lm_head.weight" in found
    assert all(found[name] is not None and torch.equal(found[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_as_peft_merges(name: str) -> None:
    adapted = get_peft_model(llama(), LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[name]))
    if "modules_to_save" in ADAPTERS[name]:
        torch.nn.init.normal_(adapted.get_output_embeddings().modules_to_save["default"].weight)
    before = {key: one.clone() for key, one in adapted.state_dict().items()}
    found = dict(whole_weights(adapted.get_base_model()))
    assert all(torch.equal(before[key], one) for key, one in adapted.state_dict().items())
    expected = deepcopy(adapted).merge_and_unload().state_dict()
    assert found.keys() == expected.keys() == llama().state_dict().keys()
    assert all(torch.equal(found[key], one) for key, one in expected.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_switched_off_adapters_leave_what_was_there_before(name: str) -> None:
    adapted = get_peft_model(llama(), LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[name]))
    if "modules_to_save" in ADAPTERS[name]:
        torch.nn.init.normal_(adapted.get_output_embeddings().modules_to_save["default"].weight)
    with adapted.disable_adapter():
        found = dict(whole_weights(adapted.get_base_model()))
    expected = llama().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], one) for key, one in expected.items())


def test_names_are_those_of_checkpoints(tmp_path: Any) -> None:
    """Experts are stacked in memory and single in files."""
    from safetensors.torch import load_file

    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, decoder_sparse_step=1
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = dict(whole_weights(model))
    assert any(".experts.1." in name for name in expected)
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
