"""Bradley-Terry against numbers worked out by hand."""

import torch
from torch.testing import assert_close

from stages.losses.reward import bradley_terry

CHOSEN = torch.tensor([2.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([1.0, 1.0], dtype=torch.float64)


def test_values():
    # differences 1 and -1: log(1 + e^-1), log(1 + e)
    expected = torch.tensor([0.313261688, 1.313261688], dtype=torch.float64)
    assert_close(bradley_terry(CHOSEN, REJECTED), expected, atol=1e-9, rtol=0)


def test_margin_and_centering():
    # margins 1 and -1 cancel the differences: log 2 each; plus 0.1 * 3^2 and 0.1 * 1^2
    losses = bradley_terry(CHOSEN, REJECTED, torch.tensor([1.0, -1.0]), center_coefficient=0.1)
    assert_close(losses, torch.tensor([1.593147181, 0.793147181], dtype=torch.float64), atol=1e-9, rtol=0)


def test_gradients():
    scores = [values.clone().requires_grad_() for values in (CHOSEN, REJECTED)]
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, CHOSEN, 0.3), scores)


def test_pairs_do_not_see_each_other():
    apart = [bradley_terry(CHOSEN[i : i + 1], REJECTED[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(apart), bradley_terry(CHOSEN, REJECTED))


def test_a_constant_added_to_both_scores_changes_nothing_without_centering():
    assert_close(bradley_terry(CHOSEN + 3, REJECTED + 3), bradley_terry(CHOSEN, REJECTED), atol=1e-12, rtol=0)
