"""Packed rows of prefix trees give the losses and gradients of separate rows, for every kind of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.training import model as model_module
from stages.training.batch import Branch, Group, layout
from stages.training.model import Scorer, token_logprobs
from stages.training.probes import settle_layout
from tests.training.conftest import packing_scorer, random_groups, tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def weighted_loss(logprobs_N: Tensor) -> Tensor:
    """Every token another weight, so that a gradient at the wrong place shows."""
    return (logprobs_N * torch.linspace(0.5, 1.5, len(logprobs_N), device=logprobs_N.device)).sum()


def separate_rows(model: nn.Module, groups: list[Group]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients with a row of its own for every branch, by the model's own logits."""
    logprobs = []
    for group in groups:
        for branch in group.branches:
            ids = torch.tensor([[*group.prefix_ids, *branch.token_ids]])
            logs_TV = model(input_ids=ids).logits[0].log_softmax(-1)
            asked = torch.arange(len(group.prefix_ids), ids.shape[1])
            logprobs.append(logs_TV[asked - 1, ids[0, asked]])
    loss = weighted_loss(torch.cat(logprobs))
    loss.backward()
    return float(loss), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close_to(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> None:
    """Relative to a gradient's own norm, or to a tenth of the largest one's."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float((found[name].to(gradient.device) - gradient).norm())
        assert difference < tolerance * max(float(gradient.norm()), 0.1 * scale), name


def groups_sharing_much() -> list[Group]:
    """Groups of several lengths, one of them with branches that begin alike for twenty tokens."""
    common = [3 + (7 * i) % 50 for i in range(20)]
    deep = Group("deep", (5, 9, 4), (Branch([*common, 7, 8]), Branch([*common, 11]), Branch([12, 13, 14])))
    return [deep, *random_groups(4, 3, prefix=(3, 14))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradients_equal_separate_rows(model_type: str, checkpointing: bool) -> None:
    model: Any = tiny_model(model_type, **MODELS[model_type])
    groups = groups_sharing_much()
    expected_loss, expected = separate_rows(model, groups)
    scorer = packing_scorer(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = layout(groups)
    loss = weighted_loss(scorer(batch, token_logprobs(batch)).logprobs_N)
    loss.backward()
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert_close_to(expected, gradients(model), 1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_at_the_end_of_a_row_change_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where rows end at a multiple of 256, which is more than the positions that these models have."""
    model: Any = tiny_model(model_type, **MODELS[model_type])
    groups = groups_sharing_much()
    expected_loss, expected = separate_rows(model, groups)
    scorer = packing_scorer(model)
    monkeypatch.setitem(model_module._SHAPES_MULTIPLE, "cpu", 256)
    batch = scorer.layout(groups)
    assert batch.input_ids_BT.shape == (1, 256) and batch.num_tokens + scorer.context_length < 256
    loss = weighted_loss(scorer(batch, token_logprobs(batch)).logprobs_N)
    loss.backward()
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert_close_to(expected, gradients(model), 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "mixtral", "qwen3_moe"])
def test_last_layer_runs_on_the_positions_that_are_read(model_type: str) -> None:
    """Few of many positions are asked for: the feed-forward part of the last layer must not see the others."""
    scorer = packing_scorer(tiny_model(model_type, **MODELS[model_type]))
    seen = []
    last = scorer.transformers_model.base_model.layers[-1]
    last.mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[-2]))
    groups = random_groups(4, 2, prefix=(20, 30))
    batch = layout(groups)
    with torch.no_grad():
        few_N = scorer(batch, token_logprobs(batch)).logprobs_N
        scorer.reads_few = False
        all_N = scorer(batch, token_logprobs(batch)).logprobs_N
    torch.testing.assert_close(few_N, all_N, atol=1e-5, rtol=0)
    assert seen == [len(few_N), batch.num_tokens]


def test_recurrent_state_gets_separate_rows_with_a_reason() -> None:
    scorer = Scorer(tiny_model("mamba", state_size=4, num_hidden_layers=2))
    reason = settle_layout(scorer)
    assert reason is not None
    assert "Mamba" in reason
    assert not scorer.share_prefixes
    groups = random_groups(2, 2)
    batch = scorer.layout(groups)
    assert batch.packed is None
    with torch.no_grad():
        ours_N = scorer(batch, token_logprobs(batch)).logprobs_N
        expected = separate_logprobs(scorer.model, groups)
    torch.testing.assert_close(ours_N, expected, atol=2e-5, rtol=5e-6)


def separate_logprobs(model: Any, groups: list[Group]) -> Tensor:
    parts = []
    for group in groups:
        for branch in group.branches:
            ids = torch.tensor([[*group.prefix_ids, *branch.token_ids]])
            asked = torch.arange(len(group.prefix_ids), ids.shape[1])
            parts.append(model(input_ids=ids).logits[0].log_softmax(-1)[asked - 1, ids[0, asked]])
    return torch.cat(parts)
