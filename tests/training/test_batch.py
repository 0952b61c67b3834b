"""Shared prefixes and packed positions give the log-probabilities of separate rows."""

from __future__ import annotations

import pytest
import torch

from stages.training.batch import Branch, Group, layout
from stages.training.model import Scorer, token_logprobs
from stages.training.prefix_tree import LEAST_SHARED
from stages.training.probes import check_head
from tests.training.conftest import packing_scorer, random_groups, tiny_model


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
        expected = [
            value for group in groups for branch in group.branches for value in separate_logprobs(model, group, branch)
        ]
        logprobs, *_ = packing_scorer(model)(batch, token_logprobs(batch))
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=2e-5, rtol=0)


def test_masked_tokens_are_not_asked_for() -> None:
    # one sequence 5 6 7 8, tokens 1 and 3 asked for: predicted from positions 0 and 2
    batch = layout([Group("a", (), (Branch([5, 6, 7, 8], [False, True, False, True]),))])
    assert batch.source_N.tolist() == [0, 2]
    assert batch.target_N.tolist() == [6, 8]
    assert batch.num_tokens == 4


def test_layout_of_a_pair_by_hand() -> None:
    # prefix 5 6, chosen 7 8, rejected 9: positions restart after the prefix, 9 does not see 7 and 8
    batch = layout([Group("a", (5, 6), (Branch([7, 8]), Branch([9])))])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.source_N.tolist() == [1, 2, 1]
    assert batch.branch_N.tolist() == [0, 0, 1]
    assert batch.last_K.tolist() == [3, 4]
    assert batch.packed is not None
    assert [(s.start, s.stop, s.end, s.position, s.parent) for s in batch.packed.segments] == [
        (0, 2, 5, 0, None),
        (2, 4, 4, 2, 0),
        (4, 5, 5, 2, 0),
    ]


def test_branches_that_begin_alike_share_more_than_the_prefix() -> None:
    # 16 tokens in common make a segment of their own; one branch ends where it does
    common = list(range(3, 3 + LEAST_SHARED))
    group = Group("a", (40,), (Branch([*common, 50]), Branch([51]), Branch(common), Branch([*common, 52, 53])))
    batch = layout([group])
    assert batch.packed is not None
    assert [(s.start, s.stop, s.end, s.position, s.parent) for s in batch.packed.segments] == [
        (0, 1, 21, 0, None),
        (1, 17, 20, 1, 0),
        (17, 18, 18, 17, 1),
        (18, 20, 20, 17, 1),
        (20, 21, 21, 1, 0),
    ]
    assert batch.num_tokens == 21
    assert batch.last_K.tolist() == [17, 20, 16, 19]
    assert batch.tokens_per_branch().tolist() == [17, 1, 16, 18]


def test_first_token_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="nothing before it"):
        layout([Group("a", (), (Branch([5, 6]),))])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2"])
def test_head_of_known_architectures(model_type: str) -> None:
    check_head(Scorer(tiny_model(model_type)))
