"""A value model of its own beside the policy: one update of PPO against a plain implementation, row by row."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stages.training.batch import Branch, Group
from stages.training.ppo import PpoLoss, PpoSettings
from stages.training.probes import settle_layout
from stages.training.token_table import ValuedRollouts
from stages.training.value_model import PolicyAndValueModel

VOCABULARY, TEMPERATURE, CLIP, VALUE_CLIP, VALUE_WEIGHT = 12, 0.7, 0.2, 0.3, 0.1


def model_of(kind: Any, seed: int, **sizes: int) -> Any:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.5, num_labels=1, **heads, **sizes
    )
    return kind(config).eval()


@dataclass
class Row:
    """A prompt and its completion; log-probabilities, values, advantages and returns of the completion's tokens."""

    prompt: list[int]
    completion: list[int]
    old: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Far enough from the models' own numbers for both clips to be met, on either side; two rows share a prompt."""
    draws = torch.Generator().manual_seed(3)
    made = []
    for prompt, completion in ([4, 5, 6], [7, 8]), ([4, 5, 6], [9, 3, 5, 1]), ([2], [10]), ([8, 11], [4, 4, 6]):
        size = len(completion)
        noise = torch.randn(4, size, generator=draws, dtype=torch.float64)
        made.append(Row(prompt, completion, noise[0] - 2.5, noise[1], noise[2], noise[3] * 2))
    return made


def group_of(number: int, rows: list[Row]) -> Group:
    data = ValuedRollouts(
        advantages=tuple(float(row.advantages.mean()) for row in rows),
        sampled_logprobs=tuple(row.old.tolist() for row in rows),
        old_logprobs=tuple(row.old.tolist() for row in rows),
        values=tuple(row.values.tolist() for row in rows),
        token_advantages=tuple(row.advantages.tolist() for row in rows),
        returns=tuple(row.returns.tolist() for row in rows),
    )
    return Group(f"r{number}", rows[0].prompt, tuple(Branch(row.completion) for row in rows), data)


def plain_losses(policy: Any, critic: Any, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means over all tokens of a policy loss, a value loss, and the shares of tokens that were clipped: TRL's formulas
    (trl-inventory 2.17), a row at a time. What is clipped is what the larger of two losses comes from."""
    found: list[tuple[Tensor, ...]] = []
    for row in rows:
        tokens, places = torch.tensor([row.prompt + row.completion]), slice(len(row.prompt) - 1, -1)
        logits_TV = policy(input_ids=tokens).logits[0, places] / TEMPERATURE
        new_T = logits_TV.log_softmax(-1)[range(len(row.completion)), row.completion]
        value_T = critic.score(critic.model(input_ids=tokens).last_hidden_state)[0, places, 0]
        ratio_T = (new_T - row.old).exp()
        losses = -row.advantages * ratio_T, -row.advantages * ratio_T.clamp(1 - CLIP, 1 + CLIP)
        near_T = torch.minimum(torch.maximum(value_T, row.values - VALUE_CLIP), row.values + VALUE_CLIP)
        squares = (value_T - row.returns) ** 2, (near_T - row.returns) ** 2
        clipped = losses[1] > losses[0], squares[1] > squares[0]
        found.append((torch.maximum(*losses), torch.maximum(*squares) / 2, *clipped))
    policy_T, value_T, clipped_T, near_T = (torch.cat(parts).double().mean() for parts in zip(*found, strict=True))
    return policy_T, value_T, clipped_T, near_T


@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_are_those_of_a_plain_step(rows: list[Row], packed: bool) -> None:
    """Two models of different sizes; rows packed with the shared prompt once, and padded."""
    policy = model_of(LlamaForCausalLM, 1, hidden_size=16, intermediate_size=24)
    critic = model_of(LlamaForSequenceClassification, 2, hidden_size=8, intermediate_size=12)
    plain = deepcopy(policy), deepcopy(critic)
    expected = plain_losses(*plain, rows)
    (expected[0] + VALUE_WEIGHT * expected[1]).backward()
    assert 0 < expected[2] < 1 and 0 < expected[3] < 1  # both clips are met, and not by all tokens

    scorer = PolicyAndValueModel(policy, critic)
    assert settle_layout(scorer) is None
    scorer.share_prefixes = packed
    batch = scorer.layout([group_of(0, rows[:2]), group_of(1, rows[2:3]), group_of(2, rows[3:])])
    assert (batch.packed is not None) == packed
    loss, metrics = PpoLoss(PpoSettings(TEMPERATURE, CLIP, VALUE_WEIGHT, VALUE_CLIP))(scorer, batch)
    tokens = sum(len(row.completion) for row in rows)
    (loss / tokens).backward()

    assert loss.item() / tokens == pytest.approx((expected[0] + VALUE_WEIGHT * expected[1]).item(), rel=1e-6)
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg")
    found = [float(metrics[name].sum) / float(metrics[name].count) for name in names]
    assert found == pytest.approx([one.item() for one in expected], rel=1e-6)
    for ours, theirs in zip((policy, critic), plain, strict=True):
        for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5, msg=name)
