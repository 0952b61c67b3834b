"""Advantages against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from stages.losses.advantages import ADVANTAGES, grpo, rloo

NAN = float("nan")


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_grpo_divides_by_the_groups_own_deviation():
    # 1, 2, 3: mean 2, deviation sqrt(2/2) = 1. 0, 0, 3: mean 1, deviation sqrt((1 + 1 + 4)/2) = sqrt 3
    expected = [[-1 / 1.0001, 0, 1 / 1.0001], [x / (math.sqrt(3) + 1e-4) for x in (-1, -1, 2)]]
    assert_close(grpo(tensor([[1, 2, 3], [0, 0, 3]])), tensor(expected), atol=1e-12, rtol=0)


def test_grpo_scaled_by_the_batch():
    # all of 1, 2, 3, 0, 0, 3: mean 1.5, sum of squares 2 * .25 + 4 * 2.25 = 9.5, deviation sqrt(9.5/5)
    scale = math.sqrt(1.9) + 1e-4
    expected = tensor([[-1, 0, 1], [-1, -1, 2]]) / scale
    actual = grpo(tensor([[1, 2, 3], [0, 0, 3]]), scale_rewards="batch")
    assert_close(actual, expected, atol=1e-12, rtol=0)


def test_grpo_unscaled():
    assert grpo(tensor([[1, 2, 3]]), scale_rewards="none").tolist() == [[-1, 0, 1]]


def test_grpo_leaves_out_what_was_not_scored():
    # 1 and 3 remain: mean 2, deviation sqrt(2/1); the second group has one score, the third none
    scale = math.sqrt(2) + 1e-4
    rewards = tensor([[1, NAN, 3], [NAN, 5, NAN], [NAN, NAN, NAN]])
    expected = tensor([[-1 / scale, 0, 1 / scale], [0, 0, 0], [0, 0, 0]])
    assert_close(grpo(rewards), expected, atol=1e-12, rtol=0)


def test_rloo_compares_with_the_mean_of_the_others():
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    assert rloo(tensor([[1, 2, 6]])).tolist() == [[-3.0, -1.5, 4.5]]


def test_rloo_leaves_out_what_was_not_scored():
    # 1 - 6 and 6 - 1; a single score has no baseline
    rewards = tensor([[1, NAN, 6], [NAN, 2, NAN]])
    assert rloo(rewards).tolist() == [[-5, 0, 5], [0, 0, 0]]


def test_rloo_normalized_over_the_batch():
    # -5 and 5 (the unscored one counts nowhere): mean 0, deviation sqrt(50)
    expected = tensor([[-5, 0, 5]]) / (math.sqrt(50) + 1e-4)
    actual = rloo(tensor([[1, NAN, 6]]), normalize_advantages=True)
    assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name, dtype):
    # the float32 mean of seven times 0.1 is not 0.1, and 1e-9 over 1e-4 would still be trained on
    assert ADVANTAGES[name](torch.full((1, 7), 0.1, dtype=dtype)).tolist() == [[0.0] * 7]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_do_not_see_each_other(name):
    rewards = tensor([[1, 2, 3], [0, NAN, 3], [5, 5, 4]])
    whole = ADVANTAGES[name](rewards)
    apart = torch.cat([ADVANTAGES[name](rewards[i : i + 1]) for i in range(3)])
    assert torch.equal(whole, apart)


def test_rloo_is_grpo_unscaled_times_g_over_g_minus_one():
    # r_i - (sum - r_i)/(G - 1) = (r_i - mean) G/(G - 1)
    rewards = tensor([[0.3, 1.7, -2.0, 0.4]])
    assert_close(rloo(rewards), grpo(rewards, scale_rewards="none") * 4 / 3, atol=1e-12, rtol=0)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="found 'groups'"):
        grpo(tensor([[1, 2]]), scale_rewards="groups")
