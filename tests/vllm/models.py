"""Tiny Llamas that vLLM takes on a CPU (heads of 32 features or more), and what transformers says of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from stages.rollouts.engine import ServedModel
from tests.data.characters import IDS, build_tokenizer

EOS = IDS["<eos>"]


def save_model(folder: Path, seed: int, *, tied: bool = False, intermediate_size: int = 96) -> Any:
    """A model whose next token depends on the prompt, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        bos_token_id=IDS["<bos>"],
        eos_token_id=EOS,
        pad_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def served(folder: Path) -> ServedModel:
    return ServedModel(folder, folder, "float32", len(IDS), (EOS,), seed=7)


def teacher_forced(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of each token, in one pass of transformers over prompt and completion."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@torch.no_grad()
def over_kept_cache(
    models: Mapping[int, Any],
    prompt: Sequence[int],
    tokens: Sequence[int],
    versions: Sequence[int],
    *,
    prompt_by: int | None = None,
) -> list[float]:
    """Log-probability of each token by the model of its version, over a cache that no later one touches: every token
    was read by the model that drew the next one, the prompt by that of the first token, or but for its last token by
    another one."""
    cache, found, unread = DynamicCache(), [], list(prompt)
    if prompt_by is not None and unread[:-1]:
        models[prompt_by](torch.tensor([unread[:-1]]), past_key_values=cache)
        unread = unread[-1:]
    for token, version in zip(tokens, versions, strict=True):
        logits_V = models[version](torch.tensor([unread]), past_key_values=cache).logits[0, -1]
        found.append(float(logits_V.log_softmax(-1)[token]))
        unread = [token]
    return found


def worst(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Largest difference; both in the same order."""
    pairs = [pair for two in zip(found, expected, strict=True) for pair in zip(*two, strict=True)]
    assert len(pairs) > 20, "too few tokens to tell"
    return max(abs(one - other) for one, other in pairs)
