"""Credits of sampled tokens, worked out by hand; and of what they are the gradient, over all completions there are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.policy_tokens import Sequences
from stages.losses.sampled_distillation import (
    SAMPLED_LOSSES,
    SampledTokens,
    future_sums,
    iw_opd,
    iw_opd_weights,
    minillm,
)

ADVANTAGES = [1.0, -2.0, 0.5, -1.0]
"""Of a completion of three tokens, and of one of one token."""
CREDITS: list[tuple[str, dict[str, Any], list[float]]] = [
    # |a| sums to 3.5, of which 3.5, 2.5 and .5 are to come: w = 1.5, 1 + .5 * 5/7, 1 + .5 / 7
    ("iw_opd", {}, [1.5, -19 / 7, 7.5 / 14, -1.5]),
    ("iw_opd", {"iw_opd_gamma": 2.0}, [3.0, -2 * 17 / 7, 0.5 * 9 / 7, -3.0]),
    ("iw_opd", {"iw_opd_gamma": 0.0}, ADVANTAGES),
    # what follows, and its mean: (-2 + .5) / 2, .5, nothing
    ("minillm", {}, [-0.75, 0.5, 0.0, 0.0]),
    ("minillm", {"length_normalization": False}, [-1.5, 0.5, 0.0, 0.0]),
    ("minillm", {"length_normalization": False, "gamma": 0.5}, [-0.875, 0.25, 0.0, 0.0]),
    # (-2 * .5 + .5 * .25) / .75
    ("minillm", {"gamma": 0.5}, [-7 / 6, 0.5, 0.0, 0.0]),
    # with the token itself: 1 - 1 + .125, -2 + .25, .5; weights 1.75, 1.5, 1
    (
        "minillm",
        {"single_step_decomposition": False, "length_normalization": False, "gamma": 0.5},
        [0.125, -1.75, 0.5, -1.0],
    ),
    ("minillm", {"single_step_decomposition": False, "gamma": 0.5}, [0.125 / 1.75, -1.75 / 1.5, 0.5, -1.0]),
    ("minillm", {"single_step_decomposition": False}, [-0.5 / 3, -0.75, 0.5, -1.0]),
    ("minillm", {"single_step_decomposition": False, "gamma": 0.0}, ADVANTAGES),
]


def tokens(advantages: list[float], lengths: list[int]) -> SampledTokens:
    of_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return SampledTokens(torch.tensor(advantages, dtype=torch.float64), Sequences(of_N, len(lengths)))


@pytest.mark.parametrize(("name", "settings", "expected"), CREDITS)
def test_values(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    credits_N = SAMPLED_LOSSES[name].with_settings(settings)(tokens(ADVANTAGES, [3, 1]))
    assert_close(credits_N, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SAMPLED_LOSSES)
def test_completions_do_not_see_each_other(name: str) -> None:
    """To the last bit, whatever stands beside one."""
    torch.manual_seed(0)
    lengths, drawn = [5, 1, 9, 2], torch.randn(17).tolist()
    alone, start = [], 0
    for length in lengths:
        alone.append(SAMPLED_LOSSES[name].function(tokens(drawn[start : start + length], [length])))
        start += length
    assert torch.equal(SAMPLED_LOSSES[name].function(tokens(drawn, lengths)), torch.cat(alone))


def test_no_token_and_no_advantage() -> None:
    for loss in SAMPLED_LOSSES.values():
        assert loss.function(tokens([], [0])).tolist() == []
        assert loss.function(tokens([0.0, 0.0, 0.0], [2, 1])).tolist() == [0.0, 0.0, 0.0]
    assert iw_opd_weights(tokens([0.0, 0.0], [2])).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.997, 1.0])
def test_sums_of_a_long_completion(gamma: float) -> None:
    """Token by token from the end; no power of gamma runs over or under."""
    torch.manual_seed(1)
    values_N = torch.randn(3000, dtype=torch.float64)
    expected, later = [0.0] * 3000, 0.0
    for place in reversed(range(3000)):
        later = expected[place] = float(values_N[place]) + gamma * later
    found = future_sums(values_N, Sequences(torch.zeros(3000, dtype=torch.long), 1), gamma=gamma)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-12)


V, T = 3, 3
Credits = Callable[[SampledTokens], Tensor]


def logs_of(logits: dict[tuple[int, ...], Tensor], completion: tuple[int, ...]) -> Tensor:
    """[T] log-probabilities of a completion's tokens, each after the ones before."""
    return torch.stack([logits[completion[:t]].log_softmax(0)[completion[t]] for t in range(T)])


def divergence(student: dict[tuple[int, ...], Tensor], teacher: dict[tuple[int, ...], Tensor], at: Any) -> Tensor:
    ours, theirs = (one[at].log_softmax(0) for one in (student, teacher))
    return (ours.exp() * (ours - theirs)).sum()


def two_models() -> tuple[dict[tuple[int, ...], Tensor], dict[tuple[int, ...], Tensor]]:
    """Logits [V] after every beginning of a completion of T tokens: a student's, with a gradient, and a teacher's."""
    torch.manual_seed(2)
    beginnings = [one for length in range(T) for one in product(range(V), repeat=length)]
    drawn = torch.randn(2, len(beginnings), V, dtype=torch.float64)
    student = {one: drawn[0, place].clone().requires_grad_() for place, one in enumerate(beginnings)}
    return student, {one: drawn[1, place] for place, one in enumerate(beginnings)}


def expected_gradient(credits_of: Credits, *, exact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Over all completions: the gradient of the policy gradient's loss, and that of the divergence of completions."""
    student, teacher = two_models()
    loss = whole = torch.zeros((), dtype=torch.float64)
    for completion in product(range(V), repeat=T):
        ours_T, theirs_T = logs_of(student, completion), logs_of(teacher, completion)
        probability = ours_T.sum().exp()
        whole = whole + probability * (ours_T - theirs_T).sum()
        seen = SampledTokens((theirs_T - ours_T).detach(), Sequences(torch.zeros(T, dtype=torch.long), 1))
        of_one = -(credits_of(seen) * ours_T).sum()
        if exact:
            of_one = of_one + sum(divergence(student, teacher, completion[:t]) for t in range(T))
        loss = loss + probability.detach() * of_one
    places = list(student.values())
    slopes = [torch.autograd.grad(one, places, retain_graph=True) for one in (loss, whole)]
    return list(slopes[0]), list(slopes[1])


@pytest.mark.parametrize("decomposed", [True, False])
def test_minillm_is_on_average_the_gradient_of_the_divergence_of_completions(decomposed: bool) -> None:
    """arXiv:2306.08543, eq. 2 and 3, which agree. With a_t beside the exact divergence at t it would be another."""

    def credits_of(seen: SampledTokens) -> Tensor:
        return minillm(seen, length_normalization=False, single_step_decomposition=decomposed)

    found, wanted = expected_gradient(credits_of, exact=decomposed)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, atol=1e-12, rtol=0)


def test_unweighted_advantages_are_on_average_the_divergence_at_every_token() -> None:
    """iw_opd without its weights: the reverse KL divergence after each beginning, as often as it is sampled."""
    found, _ = expected_gradient(lambda seen: iw_opd(seen, iw_opd_gamma=0.0), exact=False)
    wanted, _ = expected_gradient(lambda seen: torch.zeros_like(seen.advantages_N), exact=True)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, atol=1e-12, rtol=0)
