"""Drawing tokens: the inverse of the cumulative distribution, and the filters, by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from stages.rollouts.draw import draw, inverse_cdf, penalized, uniforms
from stages.rollouts.requests import SamplingConfig

# probabilities 0.5, 0.25, 0.15, 0.1: the cumulative distribution is 0.5, 0.75, 0.9, 1
PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


def tokens(draws, probabilities=PROBABILITIES, **settings):
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(len(draws), -1)
    drawn = draw(logits, torch.tensor(draws, dtype=torch.float64), SamplingConfig(**settings))
    return drawn.tokens_B, drawn.logprobs_B


def test_the_number_picks_the_interval_it_falls_into():
    drawn, logprobs = tokens([0.0, 0.499, 0.501, 0.749, 0.751, 0.899, 0.901, 1 - 2**-53])
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = torch.tensor([PROBABILITIES[token] for token in drawn.tolist()], dtype=torch.float64).log()
    assert_close(logprobs, expected, atol=1e-12, rtol=0)


# (settings, probabilities left, renormalized by hand)
FILTERS = [
    ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
    # 0.5 is short of 0.7, 0.75 is not
    ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
    ({"top_p": 0.4}, [1, 0, 0, 0]),
    # at least 0.25 of 0.5
    ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
    # squares: 25, 6.25, 2.25, 1 of 34.5
    ({"temperature": 0.5}, [25 / 34.5, 6.25 / 34.5, 2.25 / 34.5, 1 / 34.5]),
    # top_k leaves 5/9, 2.5/9, 1.5/9; of these the first two have 7.5/9 >= 0.8
    ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
    ({"top_k": 4}, PROBABILITIES),
]


@pytest.mark.parametrize(("settings", "expected"), FILTERS)
def test_filters(settings, expected):
    grid = [(index + 0.5) / 1000 for index in range(1000)]
    drawn, logprobs = tokens(grid, **settings)
    share = torch.bincount(drawn, minlength=4) / 1000
    assert_close(share, torch.tensor(expected, dtype=torch.float32), atol=1.1e-3, rtol=0)
    assert (share == 0).tolist() == [value == 0 for value in expected]
    assert_close(logprobs.exp(), torch.tensor(expected).double()[drawn], atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [settings for settings, _ in FILTERS])
def test_the_models_own_logprobs_know_no_filter(settings):
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log().expand(3, -1) + 7
    drawn = draw(logits, torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64), SamplingConfig(**settings))
    own = torch.tensor(PROBABILITIES, dtype=torch.float64).log()[drawn.tokens_B]
    assert_close(drawn.model_logprobs_B, own, atol=1e-12, rtol=0)


def test_the_penalty_lowers_logits_of_either_sign():
    logits = torch.tensor([[3.0, 3.0, -3.0, -3.0]])
    seen = torch.tensor([[True, False, True, False]])
    assert penalized(logits, seen, 1.5).tolist() == [[2.0, 3.0, -4.5, -3.0]]


def test_the_penalty_comes_before_the_temperature():
    # token 0 falls from log 3 to log(3)/2, at temperature 0.5 back to log 3: 3 of 3 + 1
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    settings = SamplingConfig(repetition_penalty=2.0, temperature=0.5)
    drawn = draw(logits, torch.tensor([0.2], dtype=torch.float64), settings, torch.tensor([[True, False]]))
    assert drawn.tokens_B.tolist() == [0]
    assert_close(drawn.logprobs_B.item(), math.log(3 / 4), atol=1e-12, rtol=0)
    assert_close(drawn.model_logprobs_B.item(), math.log(3 / 4), atol=1e-12, rtol=0)


def test_top_k_keeps_tokens_equal_to_the_last():
    drawn, _ = tokens([0.1, 0.5, 0.9], [0.4, 0.2, 0.2, 0.2], top_k=2)
    assert set(drawn.tolist()) == {0, 1, 3}


def test_top_p_of_equal_tokens_keeps_no_more_than_it_needs():
    drawn, _ = tokens([0.1, 0.3, 0.6, 0.9], [0.25] * 4, top_p=0.5)
    assert set(drawn.tolist()) == {0, 1}


def test_temperature_zero_takes_the_likeliest_and_reports_the_models_own_probability():
    drawn, logprobs = tokens([0.99], temperature=0)
    assert drawn.tolist() == [0]
    assert_close(logprobs.item(), math.log(0.5), atol=1e-12, rtol=0)


def test_an_impossible_token_is_never_drawn():
    drawn, _ = tokens([0.0, 1 - 2**-53], [0.0, 1.0, 0.0])
    assert drawn.tolist() == [1, 1]


def test_inverse_cdf_equals_a_running_sum_for_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, 900, generator=generator, dtype=torch.float64) ** 20
    numbers = torch.rand(40, generator=generator, dtype=torch.float64)
    cumulative = weights.cumsum(1) / weights.sum(1, keepdim=True)
    expected = (cumulative <= numbers[:, None]).sum(1)
    assert torch.equal(inverse_cdf(weights.unflatten(1, (30, 30)), numbers), expected)


def test_uniforms_do_not_depend_on_the_batch_or_the_length():
    whole = uniforms([5, 6, 7], 9)
    assert torch.equal(uniforms([7], 4)[0], whole[2, :4])
    assert whole.min() >= 0 and whole.max() < 1 and len(whole.unique()) == 27


@pytest.mark.parametrize("vocabulary", [15, 16, 17])
def test_logits_that_are_no_numbers_are_seen(vocabulary: int) -> None:
    """Whatever square the vocabulary is padded to: a token of it, whose log-probability is NaN."""
    logits = torch.full((2, vocabulary), math.nan)
    drawn = draw(logits, torch.tensor([0.1, 0.9], dtype=torch.float64), SamplingConfig())
    assert all(0 <= token < vocabulary for token in drawn.tokens_B.tolist())
    assert drawn.logprobs_B.isnan().all()
