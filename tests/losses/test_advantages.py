"""Advantages against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from stages.losses.advantages import (
    ADVANTAGES,
    generalized_advantages,
    grpo,
    normalize_then_sum,
    reinforce_plus_plus_baseline,
    rloo,
    weighted_sum,
    whitened,
)

NAN = float("nan")


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


REWARDS = [[1, 2, 3], [0, 0, 3]]
VALUES = [
    # 1, 2, 3: mean 2, deviation sqrt(2/2) = 1. 0, 0, 3: mean 1, deviation sqrt((1 + 1 + 4)/2) = sqrt 3
    ("grpo", [[-1 / 1.0001, 0, 1 / 1.0001], [x / (math.sqrt(3) + 1e-4) for x in (-1, -1, 2)]]),
    # 1 - 5/2, 2 - 4/2, 3 - 3/2; 0 - 3/2 twice, 3 - 0
    ("rloo", [[-1.5, 0, 1.5], [-1.5, -1.5, 3]]),
    # -1, 0, 1 and -1, -1, 2: squares 2 + 6 = 8, deviation sqrt(8/5); the raw rewards' would be sqrt(1.9)
    (
        "reinforce_plus_plus_baseline",
        [[x / (math.sqrt(1.6) + 1e-4) for x in row] for row in ([-1, 0, 1], [-1, -1, 2])],
    ),
]


@pytest.mark.parametrize(("name", "expected"), VALUES)
def test_values(name, expected):
    assert_close(ADVANTAGES[name](tensor(REWARDS)), tensor(expected), atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_groups_do_not_see_each_other(name):
    rewards = tensor([[1, 2, 3], [0, NAN, 3], [5, 5, 4]])
    whole = ADVANTAGES[name](rewards)
    apart = torch.cat([ADVANTAGES[name](rewards[i : i + 1]) for i in range(3)])
    assert torch.equal(whole, apart)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_order_changes_nothing(name):
    """Neither that of the groups nor that within them."""
    rewards = tensor([[1, 2, 3], [0, NAN, 3], [5, 5, 4]])
    whole = ADVANTAGES[name](rewards)
    moved = ADVANTAGES[name](rewards.flip(0, 1)).flip(0, 1)
    assert_close(moved, whole, atol=1e-15, rtol=0)


def test_an_easier_prompt_changes_nothing_in_reinforce_plus_plus():
    easier = tensor([[1, 2, 3], [9, 9, 12]])
    expected = reinforce_plus_plus_baseline(tensor(REWARDS))
    assert_close(reinforce_plus_plus_baseline(easier), expected, atol=1e-12, rtol=0)


def test_reinforce_plus_plus_leaves_out_what_was_not_scored():
    # -1 and 1, of which the third knows nothing: deviation sqrt(2)
    expected = tensor([[-1, 0, 1], [0, 0, 0]]) / (math.sqrt(2) + 1e-4)
    actual = reinforce_plus_plus_baseline(tensor([[1, NAN, 3], [NAN, NAN, NAN]]))
    assert_close(actual, expected, atol=1e-12, rtol=0)


def rewards_of(first, second):
    return torch.stack([tensor(first), tensor(second)], dim=2)


def test_weighted_sums_are_of_those_that_scored():
    totals = weighted_sum(rewards_of([[1, NAN, NAN]], [[2, 3, NAN]]), tensor([1, 0.5]))
    assert totals[0, :2].tolist() == [2.0, 1.5] and totals[0, 2].isnan()


def test_gdpo_normalizes_each_reward_first():
    # 0, 200 -> -100, 100 over sqrt(20000); 0, 1 and 1, 0 -> -.5, .5 over sqrt(.5): each +-1/sqrt 2, whatever its size
    big, small = 100 / (math.sqrt(20000) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)
    sums = tensor([[-big - 2 * small, big + 2 * small], [-big + 2 * small, big - 2 * small]])
    scale = math.sqrt((sums * sums).sum().item() / 3) + 1e-4
    actual = normalize_then_sum(rewards_of([[0, 200], [0, 200]], [[0, 1], [1, 0]]), tensor([1, 2]))
    assert_close(actual, sums / scale, atol=1e-12, rtol=0)


def test_gdpo_leaves_out_what_was_not_scored():
    # the first reward knows -1 and 1 over sqrt 2, the second nothing of the third completion, and no reward the fourth
    part = 1 / (math.sqrt(2) + 1e-4)
    sums = tensor([[-part, 0, part, NAN]])
    scale = math.sqrt(2 * part * part / 2) + 1e-4
    actual = normalize_then_sum(rewards_of([[1, NAN, 3, NAN]], [[5, 5, NAN, NAN]]), tensor([1, 1]))
    assert_close(actual, torch.nan_to_num(sums) / scale, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_in_gdpo(dtype):
    rewards = torch.tensor([[[0.1, 0.7]] * 7, [[0.0, 0.7]] * 6 + [[1.0, 0.7]]], dtype=dtype)
    assert normalize_then_sum(rewards, torch.ones(2, dtype=dtype))[0].tolist() == [0.0] * 7


def test_generalized_advantages():
    # gamma .5, lam .5, V = 1, 2, 4: d_3 = 8 - 4 = 4, d_2 = 1 + .5 * 4 - 2 = 1, d_1 = 0 + .5 * 2 - 1 = 0
    # A_3 = 4, A_2 = 1 + .25 * 4 = 2, A_1 = 0 + .25 * 2 = .5
    rewards, values = tensor([[0, 1, 8], [6, 9, 9]]), tensor([[1, 2, 4], [2, 9, 9]])
    advantages, returns = generalized_advantages(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5)
    # the second sequence has one token: 6 - 2; what stands beyond it counts for nothing
    assert advantages.tolist() == [[0.5, 2.0, 4.0], [4.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.5, 4.0, 8.0], [6.0, 0.0, 0.0]]


def test_generalized_advantages_at_the_ends_of_lambda():
    rewards, values = tensor([[1, 0, 3, 2]]), tensor([[0.5, -1, 2, 1]])
    lengths = torch.tensor([4])
    # 0: one step ahead; 1: all that is still to come
    one_step, _ = generalized_advantages(rewards, values, lengths, gamma=0.9, lam=0.0)
    assert_close(one_step, tensor([[1 - 0.9 - 0.5, 0 + 1.8 + 1, 3 + 0.9 - 2, 2 - 1]]), atol=1e-12, rtol=0)
    _, returns = generalized_advantages(rewards, values, lengths, gamma=1.0, lam=1.0)
    assert_close(returns, tensor([[6, 5, 5, 2]]), atol=1e-12, rtol=0)


def test_sequences_of_generalized_advantages_do_not_see_each_other():
    rewards, values = tensor([[1, 2, 3], [4, 5, 6]]), tensor([[3, 1, 2], [0, 1, 1]])
    lengths = torch.tensor([2, 3])
    whole, _ = generalized_advantages(rewards, values, lengths)
    apart = [generalized_advantages(rewards[i : i + 1], values[i : i + 1], lengths[i : i + 1])[0] for i in (0, 1)]
    assert torch.equal(whole, torch.cat(apart))


def test_whitened():
    # 1, 2, 3: mean 2, variance 1
    assert_close(whitened(tensor([1, 2, 3])), tensor([-1, 0, 1]), atol=1e-7, rtol=0)
    assert_close(whitened(tensor([1, 2, 3]), shift_mean=False), tensor([1, 2, 3]), atol=1e-7, rtol=0)


def test_rloo_is_grpo_unscaled_times_g_over_g_minus_one():
    # r_i - (sum - r_i)/(G - 1) = (r_i - mean) G/(G - 1)
    rewards = tensor([[0.3, 1.7, -2.0, 0.4]])
    assert_close(rloo(rewards), grpo(rewards, scale_rewards="none") * 4 / 3, atol=1e-12, rtol=0)
