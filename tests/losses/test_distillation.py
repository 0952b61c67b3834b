"""Divergences against numbers worked out by hand."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from stages.losses.distillation import divergence_of, forward_kl, jsd, reverse_kl

DIVERGENCES = {one.__name__: one for one in (forward_kl, reverse_kl, jsd)}

# student (1/2, 1/2), teacher (3/4, 1/4); logits need no normalization, so a constant is added to both rows
STUDENT = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log() + 3
TEACHER = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log() - 2
# jsd with beta 1/2: the mixture is (5/8, 3/8), each of the two divergences counts one half
JSD = 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)) + 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))
VALUES = [
    # 3/4 log(3/2) + 1/4 log(1/2)
    ("forward_kl", {}, 0.130812036),
    # 1/2 log(2/3) + 1/2 log 2
    ("reverse_kl", {}, 0.143841036),
    ("jsd", {"beta": 0.5}, JSD),
    # mixture 1/4 (3/4, 1/4) + 3/4 (1/2, 1/2) = (9/16, 7/16)
    (
        "jsd",
        {"beta": 0.25},
        0.25 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7))
        + 0.75 * (0.5 * math.log(8 / 9) + 0.5 * math.log(8 / 7)),
    ),
]


def test_every_divergence_has_a_number():
    assert {name for name, _, _ in VALUES} == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_values(name, keywords, expected):
    actual = DIVERGENCES[name](STUDENT, TEACHER, **keywords)
    assert_close(actual, torch.tensor([expected], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_zero_for_equal_distributions_and_gradients(name, keywords, expected):
    divergence = partial(DIVERGENCES[name], **keywords)
    assert_close(divergence(TEACHER, TEACHER + 1), torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)
    student = torch.tensor([[0.3, -1.0, 0.7], [2.0, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    teacher = student.detach().flip(1)
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, teacher), [student])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_impossible_token_of_both_adds_nothing(name):
    never = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    student = torch.cat([STUDENT, never], 1).requires_grad_()
    value = DIVERGENCES[name](student, torch.cat([TEACHER, never], 1))
    assert_close(value, DIVERGENCES[name](STUDENT, TEACHER), atol=1e-12, rtol=0)
    value.sum().backward()
    assert student.grad.isfinite().all()


def test_jsd_is_symmetric_at_one_half_only():
    assert_close(jsd(STUDENT, TEACHER), jsd(TEACHER, STUDENT), atol=1e-12, rtol=0)
    swapped = jsd(TEACHER, STUDENT, beta=0.75)
    assert_close(jsd(STUDENT, TEACHER, beta=0.25), swapped, atol=1e-12, rtol=0)


def test_beta_of_trl():
    assert divergence_of(0.0).of_logits is forward_kl and divergence_of(1.0).of_logits is reverse_kl
    assert torch.equal(divergence_of(0.3).of_logits(STUDENT, TEACHER), jsd(STUDENT, TEACHER, beta=0.3))
    with pytest.raises(ValueError, match=r"between 0 and 1, found 1\.5"):
        divergence_of(1.5)
