"""Ratios, estimates of the KL divergence and corrections to the sampler against numbers worked out by hand."""

from __future__ import annotations

import math
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.policy import POLICY_LOSSES, clipped
from stages.losses.policy_correction import MODES, Correction, on_policy_enough
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import LOG_RATIOS, PolicyTokens, Sequences, ratios
from tests.losses.policy_tokens import tensor

# tokens of two sequences, interleaved: log-ratios 0.1, 0.3 of the first and -0.2, -0.4, 0.3 of the second
CHANGES = [0.1, -0.2, 0.3, -0.4, 0.3]
SEQUENCES = Sequences(torch.tensor([0, 1, 0, 1, 1]), 2)
LEVELS = [
    ("token", [0.1, -0.2, 0.3, -0.4, 0.3]),
    ("sequence", [0.2, -0.1, 0.2, -0.1, -0.1]),
    ("sequence_sum", [0.4, -0.3, 0.4, -0.3, -0.3]),
    ("sequence_token", [0.2, -0.1, 0.2, -0.1, -0.1]),
]


@pytest.mark.parametrize(("level", "expected"), LEVELS)
def test_log_ratios(level: str, expected: list[float]) -> None:
    assert_close(LOG_RATIOS[level](tensor(CHANGES), SEQUENCES), tensor(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_gradients_of_log_ratios(level: str) -> None:
    changes = tensor(CHANGES).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: LOG_RATIOS[level](values, SEQUENCES), [changes])


def test_gradient_of_a_sequences_mean_at_its_token() -> None:
    changes = tensor(CHANGES).requires_grad_()
    (LOG_RATIOS["sequence_token"](changes, SEQUENCES) * tensor([1, 2, 3, 4, 5])).sum().backward()
    assert changes.grad is not None and changes.grad.tolist() == [1, 2, 3, 4, 5]


def test_a_sequence_without_tokens() -> None:
    empty = Sequences(torch.tensor([0, 0, 2]), 3)
    assert empty.lengths().tolist() == [2, 0, 1]
    assert empty.means(tensor([1, 3, 5])).tolist() == [2, 0, 5]


LOG2 = math.log(2)
# log pi - log pi_ref: log 2, 0, -log 2
KL_VALUES = {
    "k1": [LOG2, 0.0, -LOG2],
    "k2": [LOG2 * LOG2 / 2, 0.0, LOG2 * LOG2 / 2],
    "k3": [0.5 + LOG2 - 1, 0.0, 2 - LOG2 - 1],
}


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_values(name: str) -> None:
    values = KL_ESTIMATORS[name](tensor([-1.0, -1.0, -1.0]), tensor([-1 - LOG2, -1.0, -1 + LOG2]))
    assert_close(values, tensor(KL_VALUES[name]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_gradients_token_by_token(name: str) -> None:
    logprobs, reference = tensor([-1.0, -2.0, -0.5]).requires_grad_(), tensor([-1.3, -1.0, -0.5])
    assert torch.autograd.gradcheck(lambda values: KL_ESTIMATORS[name](values, reference), [logprobs])
    apart = [KL_ESTIMATORS[name](logprobs[i : i + 1], reference[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(apart), KL_ESTIMATORS[name](logprobs, reference))


def kl_of(logits: Tensor, reference: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return (logs.exp() * (logs - reference)).sum()


# (estimate, times the ratio) -> whose expectation over tokens of the policy has the gradient of the KL divergence
EXACT = [("k1", True), ("k2", False), ("k3", True)]
WRONG = [("k1", False), ("k2", True), ("k3", False)]


@pytest.mark.parametrize(("name", "corrected"), EXACT + WRONG)
def test_which_gradients_are_those_of_the_divergence(name: str, corrected: bool) -> None:
    """Over the whole distribution, each token by its probability as a number: what sampling gives on average."""
    logits = tensor([0.3, -0.5, 1.1, 0.0]).requires_grad_()
    reference = tensor([0.1, 0.2, -0.3, 0.4]).log_softmax(-1)
    (wanted,) = torch.autograd.grad(kl_of(logits, reference), logits)
    logs = logits.log_softmax(-1)
    estimates = KL_ESTIMATORS[name](logs, reference)
    if corrected:
        estimates = estimates * (logs - logs.detach()).exp()
    (found,) = torch.autograd.grad((logs.detach().exp() * estimates).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-12, rtol=0) == ((name, corrected) in EXACT)
    if (name, corrected) == ("k1", False):
        assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


def test_k1_and_k3_have_the_divergence_as_their_mean() -> None:
    logs, reference = tensor([0.7, 0.2, 0.1]).log(), tensor([0.3, 0.3, 0.4]).log()
    for name in ("k1", "k3"):
        mean = (logs.exp() * KL_ESTIMATORS[name](logs, reference)).sum()
        assert_close(mean, kl_of(logs, reference), atol=1e-12, rtol=0)


OLD = [-1.0, -1.0, -1.0, -1.0, -1.0]
# the trainer finds the tokens e^0.1, e^-0.2, e^0.3, e^-0.4 and e^0.3 times as likely as the sampler
SAMPLED = [-1.1, -0.8, -1.3, -0.6, -1.3]
BOUNDS = {"clip_min": 0.75, "clip_max": 1.3}
RATIOS = {
    "token": [exp(0.1), exp(-0.2), exp(0.3), exp(-0.4), exp(0.3)],
    "sequence": [exp(0.4), exp(-0.3), exp(0.4), exp(-0.3), exp(-0.3)],
    "geometric": [exp(0.2), exp(-0.1), exp(0.2), exp(-0.1), exp(-0.1)],
}
# e^0.3 = 1.35 and e^0.4 = 1.49 are above 1.3, e^-0.4 = 0.67 and e^-0.3 = 0.74 below 0.75
CORRECTED = {
    "token_truncate": [exp(0.1), exp(-0.2), 1.3, 0.75, 1.3],
    "token_mask": [exp(0.1), exp(-0.2), 0, 0, 0],
    "sequence_truncate": [1.3, 0.75, 1.3, 0.75, 0.75],
    "sequence_mask": [0, 0, 0, 0, 0],
    "geometric_truncate": RATIOS["geometric"],
    "geometric_mask": RATIOS["geometric"],
}


def correct(mode: str, sampled: list[float] = SAMPLED, **bounds: Any) -> Tensor:
    correction = Correction(MODES[mode], bounds.get("clip_min"), bounds.get("clip_max"))
    return correction(tensor(OLD).requires_grad_(), tensor(sampled), SEQUENCES)


@pytest.mark.parametrize("mode", MODES)
def test_corrections(mode: str) -> None:
    found = correct(mode, **BOUNDS)
    assert not found.requires_grad
    assert_close(found, tensor(CORRECTED[mode]), atol=1e-12, rtol=0)
    assert_close(correct(mode), tensor(RATIOS[mode.split("_")[0]]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_agrees_needs_no_correction(mode: str) -> None:
    assert correct(mode, OLD, **BOUNDS).tolist() == [1.0] * 5


@pytest.mark.parametrize("mode", MODES)
def test_tokens_without_a_number_of_the_sampler_count_as_agreed(mode: str) -> None:
    agreed = [SAMPLED[0], OLD[1], SAMPLED[2], OLD[3], OLD[4]]
    missing = [SAMPLED[0], math.nan, SAMPLED[2], math.nan, math.nan]
    assert torch.equal(correct(mode, missing), correct(mode, agreed))


def test_completions_that_the_policy_has_left() -> None:
    # means of log pi_sampler - log pi: -0.2 and 0.1
    advantages = tensor([-1, -1, -1, -1, -1])

    def kept(threshold: float, advantages: Tensor = advantages) -> list[bool]:
        kept_N: list[bool] = on_policy_enough(tensor(OLD), tensor(SAMPLED), advantages, SEQUENCES, threshold).tolist()
        return kept_N

    assert kept(0.11) == [True] * 5
    assert kept(0.09) == [True, False, True, False, False]
    assert kept(0.09, -advantages) == [True] * 5


@pytest.mark.parametrize("level", LOG_RATIOS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_ratios_beyond_what_floats_hold(name: str, level: str) -> None:
    """Sequences of one token that have become e^200 times likelier or less likely, of every sign of advantage: losses
    and slopes are numbers, and where the slope counts it still has its sign."""
    settings = {"epsilon_high": 5.0} if name == "cispo" else {}
    changes_N = torch.tensor([-200.0, 0.0, 200.0] * 3, requires_grad=True)
    logprobs_N = torch.full((9,), -1.0, requires_grad=True)
    advantages_N = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(3)
    sequences = Sequences(torch.arange(9), 9)
    tokens = PolicyTokens(LOG_RATIOS[level](changes_N, sequences), changes_N, logprobs_N, advantages_N, sequences)
    losses_N = POLICY_LOSSES[name].with_settings(settings)(tokens)
    slopes = torch.autograd.grad(losses_N.sum(), (changes_N, logprobs_N), allow_unused=True)
    assert losses_N.isfinite().all() and all(one is None or one.isfinite().all() for one in slopes)
    if POLICY_LOSSES[name].function is clipped:  # far too likely, and worse than the others; bounded where better
        assert slopes[0] is not None and float(slopes[0][2]) == pytest.approx(math.exp(80)) and slopes[0][8] == 0


def test_divergences_and_corrections_beyond_what_floats_hold() -> None:
    logprobs_N = torch.tensor([-200.0, -1.0, 0.0], requires_grad=True)
    divergences_N = KL_ESTIMATORS["k3"](logprobs_N, torch.tensor([0.0, -1.0, -200.0]))
    (slopes_N,) = torch.autograd.grad(divergences_N.sum(), logprobs_N)
    expected = [math.exp(80), 0.0, 199.0]
    assert divergences_N.tolist() == pytest.approx(expected) and slopes_N.tolist() == pytest.approx(
        [-math.exp(80), 0.0, 1.0]
    )
    unbounded = Correction(MODES["sequence_truncate"], 0.5, None)
    sequences = Sequences(torch.tensor([0, 0, 1]), 2)
    found = unbounded(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-100.0, -100.0, 200.0]), sequences)
    assert found.tolist() == pytest.approx([math.exp(80), math.exp(80), 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_are_powers_up_to_their_bound(dtype: torch.dtype) -> None:
    """To the bit, with their slopes; then e^80 however far, and what is no number stays none."""
    log_ratios_N = torch.linspace(-120.0, 79.99, 4001, dtype=dtype).requires_grad_()
    for found_N, expected_N in (
        (ratios(log_ratios_N), log_ratios_N.exp()),
        (KL_ESTIMATORS["k3"](-log_ratios_N, torch.zeros_like(log_ratios_N)), log_ratios_N.expm1() - log_ratios_N),
    ):
        slopes_N = [torch.autograd.grad(one_N.sum(), log_ratios_N)[0] for one_N in (found_N, expected_N)]
        assert torch.equal(found_N, expected_N) and torch.equal(*slopes_N)
    far_N = torch.tensor([81.0, 1e9, math.inf, -math.inf, math.nan], dtype=dtype, requires_grad=True)
    most = math.exp(80)
    expected_N = torch.tensor([most, most, most, 0.0, math.nan], dtype=dtype)
    assert_close(ratios(far_N), expected_N, equal_nan=True)
    (slopes_N,) = torch.autograd.grad(ratios(far_N)[:2].sum(), far_N)
    assert slopes_N[:2].tolist() == pytest.approx([most, most])
    divergences_N = KL_ESTIMATORS["k3"](-far_N, torch.zeros_like(far_N))
    assert_close(divergences_N, torch.tensor([most, most, most, math.inf, math.nan], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_corrections_of_tokens_that_one_side_never_takes(level: str) -> None:
    """Of two tokens that the sampler never takes, two that the trainer never takes, one of each, and of neither."""
    sequences = Sequences(torch.tensor([0, 0, 1, 1, 2, 2, 3]), 4)
    never = -math.inf
    old, sampled = tensor([-1, -1, never, never, -1, never, -1]), tensor([never, never, -1, -1, never, -1, -1])

    def found(mode: str, clip_min: float | None, clip_max: float | None) -> list[float]:
        numbers: list[float] = Correction(MODES[f"{level}_{mode}"], clip_min, clip_max)(
            old, sampled, sequences
        ).tolist()
        return numbers

    mixed = [0.0, 0.0] if level != "token" else [3.0, 0.0]
    assert found("truncate", None, 3.0) == [3.0, 3.0, 0.0, 0.0, *mixed, 1.0]
    assert found("mask", 0.5, 1e12) == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
