"""Preference losses against numbers worked out by hand."""

from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from stages.losses.preference import PREFERENCE_LOSSES, PairLogprobs

# First pair: policy -2 (2 tokens) and -5 (5 tokens), reference -3 and -4: log-ratios 1 and -1, margin 2.
# Second pair: policy -4 (4 tokens) and -3 (2 tokens), reference -3 and -4: log-ratios -1 and 1, margin -2.
VALUES = [
    # -log sigmoid(0.2) = log(1 + e^-0.2) and log(1 + e^0.2)
    ("sigmoid", {"beta": 0.1}, [0.598138869, 0.798138869]),
    # 0.9 * the above + 0.1 * the other
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, [0.618138869, 0.778138869]),
    # 1 - 0.2 and 1 + 0.2
    ("hinge", {"beta": 0.1}, [0.8, 1.2]),
    # 1 - 2 < 0: no loss; 1 + 2
    ("hinge", {"beta": 1.0}, [0.0, 3.0]),
    # (1/2 + 1/5 - 5)^2 and (-1/4 - 1/2 - 5)^2
    ("ipo", {"beta": 0.1}, [18.49, 33.0625]),
]
ROWS = [[-2.0, -4.0], [-5.0, -3.0], [-3.0, -3.0], [-4.0, -4.0], [2.0, 4.0], [5.0, 2.0]]


def pairs(dtype=torch.float64) -> PairLogprobs:
    return PairLogprobs(*torch.tensor(ROWS, dtype=dtype).unbind(0))


def test_every_loss_has_a_number():
    assert {name for name, _, _ in VALUES} == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_values(name, keywords, expected):
    losses = PREFERENCE_LOSSES[name](pairs(), **keywords)
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_gradients(name, keywords, expected):
    def loss(chosen, rejected):
        return PREFERENCE_LOSSES[name](PairLogprobs(chosen, rejected, *given[2:]), **keywords)

    given = torch.tensor(ROWS, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(loss, [row.clone().requires_grad_() for row in given[:2]])


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_pairs_do_not_see_each_other(name, keywords, expected):
    whole, loss = pairs(), PREFERENCE_LOSSES[name]
    for row in range(2):
        one = PairLogprobs(*(getattr(whole, field.name)[row : row + 1] for field in fields(whole)))
        assert torch.equal(loss(one, **keywords), loss(whole, **keywords)[row : row + 1])


def test_the_second_pair_is_the_first_one_swapped_for_losses_of_the_margin():
    for name in ("sigmoid", "hinge"):
        swapped = PREFERENCE_LOSSES[name](pairs().swapped())
        assert_close(swapped, PREFERENCE_LOSSES[name](pairs()).flip(0), atol=1e-12, rtol=0)


def test_implicit_rewards_and_margins():
    chosen, rejected = pairs().rewards(0.5)
    assert chosen.tolist() == [0.5, -0.5] and rejected.tolist() == [-0.5, 0.5]
    assert pairs().margins().tolist() == [2.0, -2.0]


def test_an_extreme_margin_stays_finite():
    # -log sigmoid(-1e6) = 1e6 exactly; a plain log(sigmoid) would be -inf
    far = PairLogprobs(*(torch.tensor([value]) for value in (-1e6, 0.0, 0.0, 0.0, 1.0, 1.0)))
    assert PREFERENCE_LOSSES["sigmoid"](far, beta=1.0).item() == 1e6


def test_label_smoothing_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"label_smoothing .* found 0\.5"):
        PREFERENCE_LOSSES["sigmoid"](pairs(), label_smoothing=0.5)


def test_the_example_pair_goes_through_every_loss():
    for loss in PREFERENCE_LOSSES.values():
        assert loss(PairLogprobs.example(), beta=0.1).isfinite().tolist() == [True, True]
