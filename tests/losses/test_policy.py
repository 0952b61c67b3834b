"""Policy losses against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_tokens import Sequences
from tests.losses.policy_tokens import (
    ADVANTAGES,
    LOGPROBS,
    SEQUENCE,
    frozen_ratios,
    part_of,
    tensor,
    tokens_of,
)

# A = 2: rho = 1.5 counts as 1.2, 0.5 as it is. A = -2: 0.5 counts as 0.8, 1 and 1.5 as they are
CLIPPED = [-2.4, 1.6, -1.0, 2.0, 3.0]
# the mean log-ratios are log(0.75) / 2 and log(0.75) / 3; neither is clipped
GSPO = [-2 * math.sqrt(0.75), 2 * 0.75 ** (1 / 3)]
# w = 0.75: e^3 0.75^2 e^-2.25 times 2 (A = 2, log pi = -1), and e^2 0.75^3 e^-1.5 times -4 (A = -2, log pi = -2)
VESPO = [2 * 0.5625 * exp(0.75), -4 * 0.421875 * exp(0.5)]
# log 1.5 = 0.405 counts as 0.4 where A > 0, log 0.5 = -0.693 as -0.4 where A < 0
GMPO = [-2 * exp((0.4 + log(0.5)) / 2), 2 * exp((-0.4 + 0 + log(1.5)) / 3)]


def by_sequence(values: list[float]) -> list[float]:
    return [values[sequence] for sequence in SEQUENCE]


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


VALUES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("grpo", {}, CLIPPED),
    ("bnpo", {}, CLIPPED),
    ("dr_grpo", {}, CLIPPED),
    ("dapo", {"epsilon": 0.2, "epsilon_high": 0.28}, [-2.56, *CLIPPED[1:]]),
    # the bound of A < 0: 1.5 counts as 1.3 there; where A > 0 1.2 is less
    ("grpo", {"delta": 1.3}, [*CLIPPED[:4], 2.6]),
    ("luspo", {}, by_sequence(GSPO)),
    ("gspo", {}, by_sequence(GSPO)),
    # the second's ratio is 0.9086, and counts as 0.92
    ("gspo", {"epsilon": 0.08}, by_sequence([GSPO[0], 2 * 0.92])),
    ("gspo_token", {}, by_sequence(GSPO)),
    # -min(rho, 1.2) A log pi
    ("cispo", {"epsilon_high": 1.2}, [2.4, -2.0, 1.0, -4.0, -4.8]),
    (
        "sapo",
        {},
        [
            -8 * sigmoid(0.5),
            8 / 1.05 * sigmoid(-0.525),
            -8 * sigmoid(-0.5),
            8 / 1.05 * sigmoid(0.0),
            8 / 1.05 * sigmoid(0.525),
        ],
    ),
    (
        "sapo",
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 4.0},
        [-4 * sigmoid(1.0), 2 * sigmoid(-2.0), -4 * sigmoid(-1.0), 1.0, 2 * sigmoid(2.0)],
    ),
    ("vespo", {}, by_sequence(VESPO)),
    # k = 1, lambda = 1: w e^(1 - w)
    (
        "vespo",
        {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0},
        by_sequence([2 * 0.75 * exp(0.25), -4 * 0.75 * exp(0.25)]),
    ),
    ("gmpo", {}, by_sequence(GMPO)),
    # above at 0.3 where A > 0, below at -0.5 where A < 0
    (
        "gmpo",
        {"epsilon": 0.5, "epsilon_high": 0.3},
        by_sequence([-2 * exp((0.3 + log(0.5)) / 2), 2 * exp((-0.5 + 0 + log(1.5)) / 3)]),
    ),
]


def losses_of(name: str, settings: dict[str, Any], logprobs_N: Tensor, **known: Tensor) -> Tensor:
    loss = POLICY_LOSSES[name]
    return loss.with_settings(settings)(tokens_of(logprobs_N, loss.level, **known))


@pytest.mark.parametrize(("name", "settings", "expected"), VALUES)
def test_values(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    assert_close(losses_of(name, settings, tensor(LOGPROBS)), tensor(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "settings", "expected"), VALUES)
def test_gradients(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    """Where a weight is a number to the gradient, the derivative is that of the loss with the weight held fixed."""
    loss = POLICY_LOSSES[name]
    old_N = tokens_of(tensor(LOGPROBS), "token").logprobs_N - tokens_of(tensor(LOGPROBS), "token").changes_N
    means_N = tokens_of(tensor(LOGPROBS), "sequence").log_ratios_N

    def held(logprobs_N: Tensor) -> Tensor:
        if name == "gspo_token":
            log_ratios_N = logprobs_N - tensor(LOGPROBS) + means_N
            return POLICY_LOSSES["grpo"].with_settings(settings)(
                tokens_of(log_ratios_N, "token", old_N=tensor([0.0] * 5))
            )
        tokens = tokens_of(logprobs_N, loss.level, old_N=old_N)
        if name in ("cispo", "vespo"):
            fixed = tokens_of(tensor(LOGPROBS), loss.level, old_N=old_N)
            tokens = replace(frozen_ratios(fixed), logprobs_N=logprobs_N)
        return loss.with_settings(settings)(tokens)

    logprobs_N = tensor(LOGPROBS).requires_grad_()
    assert torch.autograd.gradcheck(held, [logprobs_N])
    (wanted,) = torch.autograd.grad(held(logprobs_N).sum(), logprobs_N)
    (found,) = torch.autograd.grad(losses_of(name, settings, logprobs_N).sum(), logprobs_N)
    assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "settings", "expected"), VALUES)
def test_sequences_do_not_see_each_other(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    """The loss of a step is the sum of its sequences' over the sum of their items."""
    loss = POLICY_LOSSES[name]
    tokens = tokens_of(tensor(LOGPROBS), loss.level)

    def weighted(some: Any) -> tuple[Tensor, int]:
        lengths_S = some.sequences.lengths()
        weights_N = loss.aggregation.weights(lengths_S, some.sequences.of_N, 10, torch.float64)
        return (loss.with_settings(settings)(some) * weights_N).sum(), loss.aggregation.count(lengths_S)

    parts = [weighted(part_of(tokens, sequence)) for sequence in (0, 1)]
    total, items = weighted(tokens)
    assert_close(sum(one for one, _ in parts), total, atol=1e-12, rtol=0)
    assert sum(count for _, count in parts) == items


LONGEST = 10
# losses 1, 2 in a sequence of 2 tokens and 3, 4, 5 in one of 3; LONGEST 10
SUMS = {
    "grpo": (1.5 + 4.0, 2),
    "dapo": (15.0, 5),
    "bnpo": (15.0, 5),
    "dr_grpo": (1.5, 2),
    "luspo": (15.0, 2),
    "gspo": (5.5, 2),
    "gspo_token": (5.5, 2),
    "cispo": (15.0, 5),
    "sapo": (5.5, 2),
    "vespo": (15.0, 5),
    "gmpo": (5.5, 2),
}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_aggregation(name: str) -> None:
    aggregation, lengths = POLICY_LOSSES[name].aggregation, torch.tensor([2, 3])
    weights = aggregation.weights(lengths, torch.tensor([0, 0, 1, 1, 1]), LONGEST, torch.float64)
    total, items = SUMS[name]
    assert (tensor([1.0, 2.0, 3.0, 4.0, 5.0]) * weights).sum().item() == pytest.approx(total, abs=1e-12)
    assert aggregation.count(lengths) == items


def test_a_masked_sequence_counts_as_a_sequence_and_as_no_token() -> None:
    lengths = torch.tensor([2, 0])
    counts = {name: POLICY_LOSSES[name].aggregation.count(lengths) for name in ("grpo", "dapo", "dr_grpo", "luspo")}
    assert counts == {"grpo": 2, "dapo": 2, "dr_grpo": 2, "luspo": 2}
    assert POLICY_LOSSES["dapo"].aggregation.count(torch.tensor([5, 0])) == 5
    weights = POLICY_LOSSES["grpo"].aggregation.weights(lengths, torch.tensor([0, 0]), LONGEST, torch.float64)
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_the_gradient_is_minus_advantage(name: str) -> None:
    """Whatever the loss, by its own weights: at equal probabilities all are REINFORCE."""
    loss = POLICY_LOSSES[name]
    settings = {"epsilon_high": 5.0} if name == "cispo" else {}
    logprobs_N = tensor(LOGPROBS).requires_grad_()
    tokens = tokens_of(logprobs_N, loss.level, old_N=logprobs_N.detach())
    weights_N = loss.aggregation.weights(torch.tensor([2, 3]), torch.tensor(SEQUENCE), LONGEST, torch.float64)
    (loss.with_settings(settings)(tokens) * weights_N).sum().backward()
    assert_close(logprobs_N.grad, -tensor(ADVANTAGES) * weights_N, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    "name", [name for name, loss in POLICY_LOSSES.items() if "clip_ratio/low_mean" in loss.metrics]
)
def test_clipped_tokens_are_those_without_gradient(name: str) -> None:
    loss = POLICY_LOSSES[name]
    logprobs_N = tensor(LOGPROBS).requires_grad_()
    tokens = tokens_of(logprobs_N, "token")
    (gradient_N,) = torch.autograd.grad(loss.with_settings({})(tokens).sum(), logprobs_N)
    low_N, high_N, either_N = (metric(tokens) for metric in loss.metrics_with({}).values())
    assert low_N.tolist() == [False, True, False, False, False]
    assert high_N.tolist() == [True, False, False, False, False]
    assert (gradient_N == 0).tolist() == (low_N | high_N).tolist() == either_N.tolist()


def test_metrics_of_cispo_and_vespo() -> None:
    tokens = tokens_of(tensor(LOGPROBS), "token")
    (clipped,) = POLICY_LOSSES["cispo"].metrics_with({"epsilon_high": 1.2}).values()
    assert clipped(tokens).tolist() == [True, False, False, False, False]
    (phi,) = POLICY_LOSSES["vespo"].metrics_with({}).values()
    assert_close(phi(tokens), tensor([0.5625 * exp(0.75), 0.421875 * exp(0.5)]), atol=1e-12, rtol=0)


def test_vespo_counts_corrections_and_bounds_them() -> None:
    # w = 0.75 * 2 in the first sequence; the second has a masked token, which counts as 1e-8
    corrections = tensor([2.0, 1.0, 1.0, 0.0, 1.0])
    found = losses_of("vespo", {}, tensor(LOGPROBS), corrections_N=corrections)
    first = 2 * exp(3 - 4.5) * 2.25
    assert_close(found[[0, 2]], tensor([first, first]), atol=1e-12, rtol=0)
    assert (found[[1, 3, 4]].abs() < 1e-20).all()


def test_gmpo_takes_the_mean_of_the_kept_tokens() -> None:
    # the first sequence's second and the second's first token are left out
    kept = torch.tensor([True, False, False, True, True])
    found = losses_of("gmpo", {}, tensor(LOGPROBS), kept_N=kept)
    weights = POLICY_LOSSES["gmpo"].aggregation.weights(
        torch.tensor([2, 3]), torch.tensor(SEQUENCE), LONGEST, torch.float64
    )
    sums = Sequences(torch.tensor(SEQUENCE), 2).sums(found * weights * kept)
    assert_close(sums, tensor([-2 * exp(0.4), 2 * exp(log(1.5) / 2)]), atol=1e-12, rtol=0)


def test_gspo_spreads_the_gradient_over_the_sequence() -> None:
    logprobs_N = tensor(LOGPROBS).requires_grad_()
    losses = losses_of("gspo", {"epsilon": 10.0}, logprobs_N)
    weights = POLICY_LOSSES["gspo"].aggregation.weights(
        torch.tensor([2, 3]), torch.tensor(SEQUENCE), LONGEST, torch.float64
    )
    (losses * weights).sum().backward()
    expected = by_sequence([GSPO[0] / 2, GSPO[1] / 3])
    assert_close(logprobs_N.grad, tensor(expected), atol=1e-12, rtol=0)


def test_gspo_token_has_the_gradient_at_the_token() -> None:
    logprobs_N = tensor(LOGPROBS).requires_grad_()
    (losses_of("gspo_token", {"epsilon": 10.0}, logprobs_N)[0]).backward()
    assert_close(logprobs_N.grad, tensor([GSPO[0], 0.0, 0.0, 0.0, 0.0]), atol=1e-12, rtol=0)
