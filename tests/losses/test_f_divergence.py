"""Scores of f-DPO against numbers, and against the derivatives of the divergences' generators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.f_divergence import F_DIVERGENCES, alpha_divergence, f_divergence_of

RATIOS = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "coefficient", "expected"),
    [
        ("reverse_kl", 0.0, 1.0),
        ("forward_kl", 0.0, 0.632120559),  # 1 - 1/e
        ("js_divergence", 0.0, 0.379885493),  # log(2e / (1 + e)) = log 2 - 0.313261688
        ("alpha_divergence", 0.5, 0.786938681),  # (e^-0.5 - 1) / -0.5
        ("alpha_divergence", 2.0, 1.718281828),  # e - 1
        ("alpha_divergence", 1.0, 1.0),  # the limit is the log-ratio
    ],
)
def test_a_log_ratio_of_one(name: str, coefficient: float, expected: float) -> None:
    assert float(f_divergence_of(name, coefficient)(torch.ones(1).double())) == pytest.approx(expected, abs=1e-8)


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha_divergence": lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * -0.7),
}


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_scores_are_derivatives_of_the_generator(name: str) -> None:
    """Up to a constant, which no margin sees."""
    ratios = RATIOS.exp().requires_grad_()
    (slopes,) = torch.autograd.grad(GENERATORS[name](ratios).sum(), ratios)
    scores = f_divergence_of(name, 0.3)(RATIOS)
    assert_close(scores - scores[2], slopes - slopes[2], atol=1e-12, rtol=1e-12)
    assert scores[2] == 0


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_gradients(name: str) -> None:
    assert torch.autograd.gradcheck(f_divergence_of(name, 0.3), [RATIOS.clone().requires_grad_()])


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_log_ratios_do_not_see_each_other(name: str) -> None:
    score = f_divergence_of(name, 0.3)
    assert torch.equal(torch.cat([score(RATIOS[:2]), score(RATIOS[2:])]), score(RATIOS))


def test_far_away_stays_finite() -> None:
    far = torch.tensor([-1e4, 1e4])
    for name in F_DIVERGENCES:
        assert f_divergence_of(name, 2.5)(far).isfinite().all()
    assert float(alpha_divergence(torch.tensor([1e4]), 2.0)) == pytest.approx(math.exp(80), rel=1e-5)
