"""Tiny models with random weights."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    # large weights make the next token depend on the prompt
    "initializer_range": 0.6,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    # alternates sliding-window and full layers, caps its scores and its logits; only eager attention caps scores
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "sliding_window": 5,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            # tied, it would repeat the last token with certainty
            "tie_word_embeddings": False,
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    # positions are learned
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24},
    ),
}


@pytest.fixture
def tiny_model():
    """tiny_model(name, dtype) -> the same model every time."""

    def build(name="llama", dtype=torch.float32, **changes):
        kind, config, extra = MODELS[name]
        torch.manual_seed(1)
        return kind(config(**{**SIZES, **extra, **changes})).to(dtype).eval()

    return build
