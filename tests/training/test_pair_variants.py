"""What variants of preference losses do to the tokens of a pair, by hand: LD-DPO and WPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.logprobs import TokenScores
from stages.training.batch import Branch, Group, TokenBatch, layout
from stages.training.pairs import NO_REFERENCE
from stages.training.preference import PairSettings, on_policy_weights, pair_logprobs

# Two pairs: 3 tokens against 2, and 1 against 3; log-probabilities of their tokens, chosen first.
GROUPS = [
    Group("a", (3, 4), (Branch((5, 6, 7)), Branch((8, 9))), NO_REFERENCE),
    Group("b", (3,), (Branch((5,)), Branch((8, 9, 5))), NO_REFERENCE),
]
LOGPROBS = torch.tensor([-1.0, -2.0, -4.0, -3.0, -1.0, -0.5, -1.0, -1.0, -2.0], dtype=torch.float64)
FIRST = 5
"""Tokens of the first pair."""


def sums_with_light_tails(batch: TokenBatch, logprobs_N: Tensor) -> Tensor:
    """[B, 2] sums of chosen and rejected under ld_alpha 1/4."""
    pairs = pair_logprobs(batch, logprobs_N, PairSettings(beta=1.0, ld_alpha=0.25))
    return torch.stack([pairs.chosen_B, pairs.rejected_B], dim=1)


def weighted_margins(batch: TokenBatch, logprobs_N: Tensor) -> Tensor:
    """[B, 1] margins times the weights of WPO; two draws are equal with probability 1/e everywhere."""
    scores = TokenScores(logprobs_N, None, torch.zeros(len(logprobs_N)), torch.full_like(logprobs_N, -1.0))
    margins_B = pair_logprobs(batch, logprobs_N, PairSettings(beta=1.0)).margins()
    return (margins_B * on_policy_weights(batch, scores))[:, None]


def held_weights(batch: TokenBatch, logprobs_N: Tensor) -> Tensor:
    """The same with weights that are numbers."""
    weights_B = torch.tensor([0.096971968, 1.181360413], dtype=torch.float64)
    return (pair_logprobs(batch, logprobs_N, PairSettings(beta=1.0)).margins() * weights_B)[:, None]


VARIANTS: dict[str, Callable[[TokenBatch, Tensor], Tensor]] = {
    "ld_alpha": sums_with_light_tails,
    "use_weighting": weighted_margins,
}


def test_every_variant_is_here() -> None:
    """Divergences and rewards have tests of their own."""
    assert {field.name for field in fields(PairSettings)} - {"beta", "divergence", "reward", "metrics"} == set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # two tokens are shared: -1 - 2 - 4/4 and -3 - 1; then one: -0.5 and -1 - 1/4 - 2/4
        ("ld_alpha", [[-4.0, -4.0], [-0.5, -1.75]]),
        # means of log p + 1: -4/3 and -1, so the margin -7 + 4 times e^-7/3; 1/2 and -1/3, so -0.5 + 4 times e^1/6
        ("use_weighting", [[-3 * 0.096971968], [3.5 * 1.181360413]]),
    ],
)
def test_values(name: str, expected: list[list[float]]) -> None:
    found = VARIANTS[name](layout(GROUPS), LOGPROBS)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "same"), [("ld_alpha", sums_with_light_tails), ("use_weighting", held_weights)])
def test_gradients(name: str, same: Callable[[TokenBatch, Tensor], Tensor]) -> None:
    """The weights of WPO have none of their own: against weights that are held fast."""
    batch, logprobs = layout(GROUPS), LOGPROBS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: same(batch, values), [logprobs])
    found, expected = (torch.autograd.grad(one(batch, logprobs).sum(), logprobs) for one in (VARIANTS[name], same))
    assert_close(found, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_pairs_do_not_see_each_other(name: str) -> None:
    parts = [(GROUPS[:1], LOGPROBS[:FIRST]), (GROUPS[1:], LOGPROBS[FIRST:])]
    apart = torch.cat([VARIANTS[name](layout(groups), logprobs) for groups, logprobs in parts])
    assert_close(apart, VARIANTS[name](layout(GROUPS), LOGPROBS), atol=1e-12, rtol=0)
