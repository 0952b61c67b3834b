"""Shared prefixes and packed positions give the log-probabilities of separate rows."""

from __future__ import annotations

import pytest
import torch

from stages.training.batch import Branch, Group, layout
from stages.training.model import Scorer, token_logprobs
from tests.training.conftest import random_groups, tiny_model


def separate_logprobs(model: torch.nn.Module, group: Group, branch: Branch) -> list[float]:
    """The plain way: one row, the model's own logits, log_softmax."""
    ids = [*group.prefix_ids, *branch.token_ids]
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(group.prefix_ids)
    asked = [t for t in range(len(branch.token_ids)) if branch.loss_mask is None or branch.loss_mask[t]]
    return [float(logits[start + t - 1, branch.token_ids[t]]) for t in asked]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("share", [True, False])
def test_logprobs_equal_separate_rows(model_type: str, share: bool) -> None:
    model = tiny_model(model_type)
    groups = random_groups(5, 3)
    batch = layout(groups, share_prefixes=share)
    with torch.no_grad():
        logprobs, _, _ = Scorer(model)(batch, token_logprobs(batch))
        expected = [
            value for group in groups for branch in group.branches for value in separate_logprobs(model, group, branch)
        ]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=2e-5, rtol=0)


def test_gradients_of_shared_prefixes_equal_separate_rows() -> None:
    groups = random_groups(4, 2, seed=1)
    gradients = []
    for share in (True, False):
        scorer = Scorer(tiny_model().double())
        batch = layout(groups, share_prefixes=share)
        logprobs, _, _ = scorer(batch, token_logprobs(batch))
        (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
        gradients.append([parameter.grad for parameter in scorer.parameters()])
    for shared, separate in zip(*gradients, strict=True):
        # not to float64's precision: transformers' norms compute in float32
        assert float((shared - separate).norm() / separate.norm()) < 1e-6


def test_masked_tokens_are_not_asked_for() -> None:
    # one sequence 5 6 7 8, tokens 1 and 3 asked for: predicted from positions 0 and 2
    batch = layout([Group("a", (), (Branch([5, 6, 7, 8], [False, True, False, True]),))])
    assert batch.source_N.tolist() == [0, 2]
    assert batch.target_N.tolist() == [6, 8]
    assert batch.attention_mask is None
    assert batch.num_tokens == 4


def test_layout_of_a_pair_by_hand() -> None:
    # prefix 5 6, chosen 7 8, rejected 9: positions restart after the prefix, 9 does not see 7 and 8
    batch = layout([Group("a", (5, 6), (Branch([7, 8]), Branch([9])))])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.source_N.tolist() == [1, 2, 1]
    assert batch.branch_N.tolist() == [0, 0, 1]
    assert batch.last_K.tolist() == [3, 4]
    assert batch.attention_mask is not None
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_first_token_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="nothing before it"):
        layout([Group("a", (), (Branch([5, 6]),))])


def test_sliding_windows_get_separate_rows() -> None:
    """A window counts rows of the key matrix, not positions: the probe notices and says so."""
    scorer = Scorer(tiny_model("mistral", sliding_window=3))
    assert scorer.settle_prefix_sharing() is not None
    assert not scorer.share_prefixes
    groups = random_groups(3, 2)
    batch = scorer.layout(groups)
    with torch.no_grad():
        logprobs, _, _ = scorer(batch, token_logprobs(batch))
        expected = [
            value
            for group in groups
            for branch in group.branches
            for value in separate_logprobs(scorer.model, group, branch)
        ]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2"])
def test_head_of_known_architectures(model_type: str) -> None:
    Scorer(tiny_model(model_type)).check_head()
