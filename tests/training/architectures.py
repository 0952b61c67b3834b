"""Tiny models of architectures that differ from the common form in what a stage touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.rollouts.requests import SamplingConfig
from stages.rollouts.sampler import EmbeddedSampler
from stages.training.model import Scorer, token_logprobs
from stages.training.probes import check_head, settle_layout
from tests.data.characters import IDS, build_tokenizer
from tests.rollouts.sampling import END, PROMPTS, requests, teacher_forced
from tests.training.conftest import random_groups, tiny_model

_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT: dict[str, Any] = {**_EXPERTS, "shared_expert_intermediate_size": 16}
GATED_NORMS: dict[str, dict[str, Any]] = {
    "qwen3_next": _DELTA_NET | _SHARED_EXPERT,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET | _SHARED_EXPERT,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
}
"""Recurrent layers with a norm that takes a gate."""
UNBOUNDED_ROWS: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "mamba": {"state_size": 4},
    "mamba2": GATED_NORMS["mamba2"],
    "falcon_mamba": {"state_size": 4},
}
"""Configurations that know no longest row."""
MPT: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
LLAMA4: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 8,
}


def save_architecture(folder: Path, model_type: str, settings: dict[str, Any], *, bounded: bool = True) -> Any:
    """One with the vocabulary of the character tokenizer, saved with it."""
    model = tiny_model(model_type, bounded=bounded, vocab_size=len(IDS), **settings)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def assert_samples_are_its_own(model: Any, *, tolerance: float = 1e-5) -> None:
    """Prompts of several lengths, which are padded where they are not shared, against the model without a cache."""
    asked = requests(2, [[token % model.config.get_text_config().vocab_size for token in ids] for ids in PROMPTS])
    sampled = EmbeddedSampler(model, eos_token_ids=END, pad_token_id=0).sample(
        asked, SamplingConfig(max_completion_length=8)
    )
    for request, completions in zip(asked, sampled, strict=True):
        for one in completions:
            expected = teacher_forced(model, list(request.prompt_ids), one.token_ids)
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=tolerance, rtol=tolerance)


def assert_logprobs_are_its_own(model: Any, *, tolerance: float = 1e-5) -> str | None:
    """Through a Scorer laid out as the stages do, against the model's own logits of separate rows; returns why rows
    share nothing."""
    scorer = Scorer(model).eval()
    check_head(scorer)
    reason = settle_layout(scorer)
    groups = random_groups(3, 2, prefix=(3, 9), vocabulary=scorer.vocabulary)
    with torch.no_grad():
        batch = scorer.layout(groups)
        ours_N = scorer(batch, token_logprobs(batch)).logprobs_N
        own = []
        for group in groups:
            for branch in group.branches:
                ids = torch.tensor([[*group.prefix_ids, *branch.token_ids]])
                asked = torch.arange(len(group.prefix_ids), ids.shape[1])
                own.append(model(input_ids=ids).logits[0].log_softmax(-1)[asked - 1, ids[0, asked]])
    torch.testing.assert_close(ours_N, torch.cat(own), atol=tolerance, rtol=tolerance)
    return reason
