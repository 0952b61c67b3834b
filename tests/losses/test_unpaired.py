"""Losses of judged completions against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.unpaired import UNPAIRED_LOSSES, JudgedLogprobs

# Log-ratios 1 and -1 of two desirable completions, -1 and 1 of two undesirable ones; KL term 0.5, reward shift 0.25,
# density ratios 2 and 0.5 of the undesirable ones. s is the sigmoid, L(x) = log(1 + e^-x).
VALUES: list[tuple[str, dict[str, float], list[float]]] = [
    # s(-0.5), s(1.5), s(-1.5), s(0.5)
    ("kto", {"beta": 1.0}, [0.377540669, 0.817574476, 0.182425524, 0.622459331]),
    # twice the first two, half of the others
    (
        "kto",
        {"beta": 1.0, "desirable_weight": 2.0, "undesirable_weight": 0.5},
        [0.755081338, 1.635148953, 0.091212762, 0.311229666],
    ),
    # s(-1), s(1), s(-1), s(1)
    ("apo_zero_unpaired", {"beta": 1.0}, [0.268941421, 0.731058579, 0.268941421, 0.731058579]),
    # three times the first two, a quarter of the others
    (
        "apo_zero_unpaired",
        {"beta": 1.0, "desirable_weight": 3.0, "undesirable_weight": 0.25},
        [0.806824264, 2.193175736, 0.067235355, 0.182764645],
    ),
    # L(1 - 0.25), L(-1 - 0.25), 2 L(1 + 0.25), 0.5 L(-1 + 0.25)
    ("bco", {"beta": 1.0}, [0.386871006, 1.501929081, 0.503858162, 0.568435503]),
]
POLICY, REFERENCE = [-2.0, -5.0, -4.0, -3.0], [-3.0, -4.0, -3.0, -4.0]


def judged() -> JudgedLogprobs:
    def row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return JudgedLogprobs(
        policy_B=row(POLICY),
        reference_B=row(REFERENCE),
        desirable_B=torch.tensor([True, True, False, False]),
        kl_B=row([0.5] * 4),
        shift_B=row([0.25] * 4),
        density_B=row([1.0, 1.0, 2.0, 0.5]),
    )


def test_every_loss_has_a_number() -> None:
    assert {name for name, _, _ in VALUES} == set(UNPAIRED_LOSSES)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_values(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    losses = UNPAIRED_LOSSES[name].function(judged(), **keywords)
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_gradients(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    def loss(policy: Tensor) -> Tensor:
        return UNPAIRED_LOSSES[name].function(replace(judged(), policy_B=policy), **keywords)

    assert torch.autograd.gradcheck(loss, [judged().policy_B.requires_grad_()])


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_completions_do_not_see_each_other(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    """What they share, the KL term and the shift, is given."""
    whole, loss = judged(), UNPAIRED_LOSSES[name].function
    for row in range(4):
        one = JudgedLogprobs(**{key: value[row : row + 1] for key, value in vars(whole).items()})
        assert torch.equal(loss(one, **keywords), loss(whole, **keywords)[row : row + 1])


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_far_away_stays_finite(name: str) -> None:
    """Losses and gradients, in float32."""
    policy = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    given = {key: value.float() if value.is_floating_point() else value for key, value in vars(judged()).items()}
    losses = UNPAIRED_LOSSES[name].function(JudgedLogprobs(**given | {"policy_B": policy}), beta=1.0)
    for values in (losses, *torch.autograd.grad(losses.sum(), policy)):
        assert values.isfinite().all()


def test_a_reward_shift_is_no_part_of_the_log_ratio() -> None:
    """BCO's boundary stands where the reward is the shift: both kinds lose log 2 there."""
    at = replace(judged(), shift_B=2.0 * judged().log_ratios(), density_B=torch.ones(4, dtype=torch.float64))
    losses = UNPAIRED_LOSSES["bco"].function(at, beta=2.0)
    assert_close(losses, torch.full((4,), 0.693147181, dtype=torch.float64), atol=1e-8, rtol=0)
