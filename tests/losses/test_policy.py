"""Policy losses and their aggregation against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from stages.losses.policy import AGGREGATIONS, LOG_RATIOS, clipped, clipped_tokens, kl_k3


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


RATIOS = [0.5, 0.5, 1.0, 1.5, 1.5]
ADVANTAGES = [2.0, -2.0, 3.0, 2.0, -2.0]
# 0.5 counts as it is where A > 0 and as 0.8 where A < 0; 1.5 as 1.2 where A > 0 and as it is where A < 0
CLIPPED = [-1.0, 1.6, -3.0, -2.4, 3.0]


def test_clipped_values():
    assert_close(clipped(tensor(RATIOS).log(), tensor(ADVANTAGES)), tensor(CLIPPED), atol=1e-12, rtol=0)


def test_a_higher_upper_bound_of_its_own():
    losses = clipped(tensor(RATIOS).log(), tensor(ADVANTAGES), epsilon=0.2, epsilon_high=0.28)
    assert_close(losses, tensor([-1.0, 1.6, -3.0, -2.56, 3.0]), atol=1e-12, rtol=0)


def test_clipped_tokens_are_those_without_gradient():
    log_ratios = tensor(RATIOS).log().requires_grad_()
    clipped(log_ratios, tensor(ADVANTAGES)).sum().backward()
    low, high = clipped_tokens(log_ratios, tensor(ADVANTAGES))
    assert low.tolist() == [False, True, False, False, False]
    assert high.tolist() == [False, False, False, True, False]
    assert (log_ratios.grad == 0).tolist() == (low | high).tolist()


def test_on_policy_gradient_is_minus_advantage():
    logprobs = tensor([-1.0, -2.0]).requires_grad_()
    sequence = torch.tensor([0, 1])
    log_ratios = LOG_RATIOS["token"](logprobs, logprobs.detach(), sequence, 2)
    clipped(log_ratios, tensor([3.0, -4.0])).sum().backward()
    assert logprobs.grad.tolist() == [-3.0, 4.0]


def test_kl_k3():
    # log pi_ref - log pi = log 2: 2 - log 2 - 1; equal: 0
    values = kl_k3(tensor([-1.0, -1.0]), tensor([-1.0 + math.log(2), -1.0]))
    assert_close(values, tensor([0.306852819, 0.0]), atol=1e-9, rtol=0)


def test_kl_k3_has_the_kl_as_its_mean():
    # summed over the whole distribution with its weights, e^d - 1 vanishes and the KL remains
    policy, reference = tensor([0.7, 0.2, 0.1]), tensor([0.3, 0.3, 0.4])
    mean = (policy * kl_k3(policy.log(), reference.log())).sum()
    assert_close(mean, (policy * (policy.log() - reference.log())).sum(), atol=1e-12, rtol=0)


# tokens of two sequences, interleaved: log-ratios 0.1, 0.3 of the first and -0.2, -0.4, 0.3 of the second
NEW = [-0.9, -1.2, -0.7, -1.4, -0.7]
OLD = [-1.0, -1.0, -1.0, -1.0, -1.0]
SEQUENCE = [0, 1, 0, 1, 1]
LEVELS = [
    ("token", [0.1, -0.2, 0.3, -0.4, 0.3]),
    ("sequence", [0.2, -0.1, 0.2, -0.1, -0.1]),
    ("sequence_sum", [0.4, -0.3, 0.4, -0.3, -0.3]),
]


@pytest.mark.parametrize(("level", "expected"), LEVELS)
def test_log_ratios(level, expected):
    actual = LOG_RATIOS[level](tensor(NEW), tensor(OLD), torch.tensor(SEQUENCE), 2)
    assert_close(actual, tensor(expected), atol=1e-12, rtol=0)


def test_every_level_has_a_number():
    assert {level for level, _ in LEVELS} == set(LOG_RATIOS)


@pytest.mark.parametrize("level", LOG_RATIOS)
def test_gradients(level):
    def loss(logprobs):
        log_ratios = LOG_RATIOS[level](logprobs, tensor(OLD), torch.tensor(SEQUENCE), 2)
        return clipped(log_ratios, tensor([1.0, -2.0, 0.5, 1.0, -1.0])) + 0.1 * kl_k3(logprobs, tensor(OLD))

    assert torch.autograd.gradcheck(loss, [tensor(NEW).requires_grad_()])


def test_sequence_ratio_spreads_the_gradient_over_the_sequence():
    # GSPO: the mean over the tokens of rho A, one rho for all, has gradient rho A / |o| at every token
    logprobs = tensor(NEW).requires_grad_()
    log_ratios = LOG_RATIOS["sequence"](logprobs, tensor(OLD), torch.tensor(SEQUENCE), 2)
    weights = AGGREGATIONS["grpo"].weights(torch.tensor([2, 3]), torch.tensor(SEQUENCE), 8, torch.float64)
    (clipped(log_ratios, torch.ones(5, dtype=torch.float64), epsilon=10) * weights).sum().backward()
    first, second = -math.exp(0.2) / 2, -math.exp(-0.1) / 3
    assert_close(logprobs.grad, tensor([first, second, first, second, second]), atol=1e-12, rtol=0)


# losses 1, 2 in a sequence of 2 tokens and 3, 4, 5 in one of 3; longest allowed 10
SUMS = [
    ("grpo", (1.5 + 4.0), 2),
    ("dapo", 15.0, 5),
    ("bnpo", 15.0, 5),
    ("dr_grpo", 1.5, 2),
]


@pytest.mark.parametrize(("name", "total", "items"), SUMS)
def test_aggregation(name, total, items):
    lengths, sequence = torch.tensor([2, 3]), torch.tensor([0, 0, 1, 1, 1])
    weights = AGGREGATIONS[name].weights(lengths, sequence, 10, torch.float64)
    assert (tensor([1.0, 2.0, 3.0, 4.0, 5.0]) * weights).sum().item() == pytest.approx(total, abs=1e-12)
    assert AGGREGATIONS[name].count(lengths) == items


def test_every_aggregation_has_a_number():
    assert {name for name, _, _ in SUMS} == set(AGGREGATIONS)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_splitting_the_batch_changes_no_loss(name):
    aggregation, losses = AGGREGATIONS[name], tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    whole = aggregation.weights(torch.tensor([2, 3]), torch.tensor([0, 0, 1, 1, 1]), 10, torch.float64)
    first = aggregation.weights(torch.tensor([2]), torch.tensor([0, 0]), 10, torch.float64)
    second = aggregation.weights(torch.tensor([3]), torch.tensor([0, 0, 0]), 10, torch.float64)
    parts = (losses[:2] * first).sum() + (losses[2:] * second).sum()
    items = aggregation.count(torch.tensor([2])) + aggregation.count(torch.tensor([3]))
    assert_close(parts / items, (losses * whole).sum() / aggregation.count(torch.tensor([2, 3])))


def test_a_masked_sequence_counts_as_a_sequence_and_as_no_token():
    lengths = torch.tensor([2, 0])
    assert [AGGREGATIONS[name].count(lengths) for name in ("grpo", "dapo", "dr_grpo")] == [2, 2, 2]
    assert AGGREGATIONS["grpo"].weights(lengths, torch.tensor([0, 0]), 10).tolist() == [0.5, 0.5]
