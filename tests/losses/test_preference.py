"""Preference losses against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses.f_divergence import F_DIVERGENCES, f_divergence_of, forward_kl
from stages.losses.pair_logprobs import PairLogprobs
from stages.losses.preference import PREFERENCE_LOSSES, weighted

# First pair: policy -2 (2 tokens) and -5 (5 tokens), reference -3 and -4: log-ratios 1 and -1, margin 2, per token
# 1/2 + 1/5 = 0.7. Policy margin 3, per token -1 and -1. Gold completion -6 of 3 tokens.
# Second pair: policy -4 (4 tokens) and -3 (2 tokens), reference -3 and -4: log-ratios -1 and 1, margin -2, per token
# -1/4 - 1/2 = -0.75. Policy margin -1, per token -1 and -1.5. Gold completion -2 of 2 tokens.
# Below, s is the sigmoid and L(x) = -log s(x) = log(1 + e^-x); s(1) = 0.731058579, s(2) = 0.880797078,
# L(1) = 0.313261688, L(-1) = 1.313261688, L(2) = 0.126928011, L(-2) = 2.126928011.
ROWS = [[-2.0, -4.0], [-5.0, -3.0], [-3.0, -3.0], [-4.0, -4.0], [2.0, 4.0], [5.0, 2.0]]
GOLD = [[-6.0, -2.0], [3.0, 2.0]]
VALUES: list[tuple[str, dict[str, float], list[float]]] = [
    # L(0.2) and L(-0.2)
    ("sigmoid", {"beta": 0.1}, [0.598138869, 0.798138869]),
    # 0.9 of the above + 0.1 of the other
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, [0.618138869, 0.778138869]),
    # L(0.7) and L(-0.75)
    ("sigmoid_norm", {"beta": 1.0}, [0.403186049, 1.136871006]),
    # 1 - 0.2 and 1 + 0.2
    ("hinge", {"beta": 0.1}, [0.8, 1.2]),
    # 1 - 2 < 0: no loss; 1 + 2
    ("hinge", {"beta": 1.0}, [0.0, 3.0]),
    # (0.7 - 5)^2 and (-0.75 - 5)^2
    ("ipo", {"beta": 0.1}, [18.49, 33.0625]),
    # q = s(1): q (log q - log 0.9) + (1 - q) (log(1 - q) - log 0.1)
    #   = 0.731058579 (-0.313261688 + 0.105360516) + 0.268941421 (-1.313261688 + 2.302585093); then with q = s(-1)
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, [0.114082108, 1.129457283]),
    # (0.9 L(1) - 0.1 L(-1)) / 0.8 and (0.9 L(-1) - 0.1 L(1)) / 0.8
    ("robust", {"beta": 0.5, "label_smoothing": 0.1}, [0.188261688, 1.438261688]),
    # x = 0.1, m = s(2): (1 - m) L(0.1) + m e^-0.1; x = -0.1, m = s(-2)
    ("discopop", {"beta": 0.05, "discopop_tau": 0.05}, [0.873792119, 0.787402006]),
    # policy margins 3 and -1, the reference's are both 1: L(0.5 * 2) and L(0.5 * -2)
    ("aot", {"beta": 0.5}, [0.313261688, 1.313261688]),
    # 0.9 L(1) + 0.1 L(-1) = L(1) + 0.1, and L(-1) - 0.1
    ("aot", {"beta": 0.5, "label_smoothing": 0.1}, [0.413261688, 1.213261688]),
    # chosen 1 and -1, rejected -1 and 1: sorted they are the same, L(0) twice
    ("aot_unpaired", {"beta": 0.5}, [0.693147181, 0.693147181]),
    # L(1) + L(-1)/2 + L(1)/2 and L(-1) + L(1)/2 + L(-1)/2
    ("nca_pair", {"beta": 1.0}, [1.126523375, 2.126523375]),
    # 2 L(1) and 2 L(-1)
    ("bco_pair", {"beta": 1.0}, [0.626523375, 2.626523375]),
    # 1/(2 beta) = 1: (1 - 1)^2 + (-1 + 1)^2 and (-1 - 1)^2 + (1 + 1)^2
    ("sppo_hard", {"beta": 0.5}, [0.0, 8.0]),
    # s(-1) + s(-1) and s(1) + s(1)
    ("apo_zero", {"beta": 1.0}, [0.537882843, 1.462117157]),
    # s(1) + s(-2) and s(-1) + s(2)
    ("apo_down", {"beta": 1.0}, [0.850261501, 1.149738499]),
    # 2/2 and 4/4
    ("sft", {}, [1.0, 1.0]),
    # L(1.5) + 1 and L(-0.5) + 1
    ("cpo", {"beta": 0.5}, [1.201413278, 1.974076984]),
    # 0.8 L(1.5) + 0.2 L(-1.5) + 3 = L(1.5) + 0.2 * 1.5 + 3, and 0.8 L(-0.5) + 0.2 L(0.5) + 3 = L(-0.5) - 0.1 + 3
    ("cpo", {"beta": 0.5, "label_smoothing": 0.2, "cpo_alpha": 3.0}, [3.501413278, 3.874076984]),
    # 1 - 1.5 < 0: no loss, and 1 + 0.5; the likelihoods add 1
    ("cpo_hinge", {"beta": 0.5}, [1.0, 2.5]),
    # (0 - 1)^2 and (0.5 - 1)^2; the likelihoods add 2
    ("cpo_ipo", {"beta": 0.5, "cpo_alpha": 2.0}, [3.0, 2.25]),
    # L(2 * 0 - 0.5) and L(2 * 0.5 - 0.5)
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, [0.974076984, 0.474076984]),
    # 0.9 L(x) + 0.1 L(-x) = L(x) + 0.1 x at the same x
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1}, [0.924076984, 0.524076984]),
    # rewards 1 - 1/p: 1 - e both, so L(0); 1 - e and 1 - e^1.5, so L(1.763407242)
    ("alphapo", {"beta": 1.0, "alpha": 1.0, "simpo_gamma": 0.0}, [0.693147181, 0.158250546]),
    # a tenth of x more
    (
        "alphapo",
        {"beta": 1.0, "alpha": 1.0, "simpo_gamma": 0.0, "label_smoothing": 0.1},
        [0.693147181, 0.334591270],
    ),
    # 1 + L(0)/2; log odds differ by 0.5 - log((1 - e^-1) / (1 - e^-1.5)) = 0.706192686: 1 + L(0.706192686)/2
    ("orpo", {"beta": 0.5}, [1.346573590, 1.200567744]),
    # L(1.5) + 6/3 and L(-0.5) + 2/2
    ("tpo", {"beta": 0.5}, [2.201413278, 1.974076984]),
    # L(1.5) + 0.15 + 6/3 and L(-0.5) - 0.05 + 2/2
    ("tpo", {"beta": 0.5, "label_smoothing": 0.1}, [2.351413278, 1.924076984]),
    # no loss and 1 + 0.5, and the gold completion's 2 and 1
    ("tpo_hinge", {"beta": 0.5}, [2.0, 2.5]),
    # (0 - 1)^2 + 2 and (0.5 - 1)^2 + 1
    ("tpo_ipo", {"beta": 0.5}, [3.0, 1.25]),
    # L(2 * 0 - 0.5) + 2 and L(2 * 0.5 - 0.5) + 1
    ("tpo_l", {"beta": 2.0, "tpo_l_gamma": 0.5}, [2.974076984, 1.474076984]),
    # a tenth of -0.5 and 0.5 more
    ("tpo_l", {"beta": 2.0, "tpo_l_gamma": 0.5, "label_smoothing": 0.1}, [2.924076984, 1.524076984]),
]
LOSSES = {name: loss.function for name, loss in PREFERENCE_LOSSES.items()}
COUPLED = {name for name, loss in PREFERENCE_LOSSES.items() if loss.couples_rows}


def pairs(**changes: Any) -> PairLogprobs:
    values = [torch.tensor(row, dtype=torch.float64) for row in [*ROWS, *GOLD]]
    return PairLogprobs(*values[:6], gold_B=values[6], gold_tokens_B=values[7], **changes)


def test_every_loss_has_a_number() -> None:
    assert {name for name, _, _ in VALUES} == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_values(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    losses = LOSSES[name](pairs(), **keywords)
    assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "keywords", "expected"), VALUES)
def test_gradients(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    known = pairs()

    def loss(chosen: Tensor, rejected: Tensor, gold: Tensor) -> Tensor:
        values = PairLogprobs(
            chosen,
            rejected,
            known.reference_chosen_B,
            known.reference_rejected_B,
            known.chosen_tokens_B,
            known.rejected_tokens_B,
            gold_B=gold,
            gold_tokens_B=known.gold_tokens_B,
        )
        return LOSSES[name](values, **keywords) + 0 * gold

    assert known.gold_B is not None
    # unlike the values above, none stands at a kink or a tie
    moved = [known.chosen_B - 0.125, known.rejected_B - 0.25, known.gold_B]
    assert torch.autograd.gradcheck(loss, [row.requires_grad_() for row in moved])


@pytest.mark.parametrize(("name", "keywords", "expected"), [row for row in VALUES if row[0] not in COUPLED])
def test_pairs_do_not_see_each_other(name: str, keywords: dict[str, float], expected: list[float]) -> None:
    whole, loss = pairs(), LOSSES[name]
    for row in range(2):
        one = whole.map(lambda values, row=row: values[row : row + 1])
        assert torch.equal(loss(one, **keywords), loss(whole, **keywords)[row : row + 1])


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "discopop"])
def test_the_second_pair_is_the_first_one_swapped_for_losses_of_the_margin(name: str) -> None:
    swapped = LOSSES[name](pairs().map(lambda values: values.flip(0)), beta=0.3)
    assert_close(swapped, LOSSES[name](pairs(), beta=0.3).flip(0), atol=1e-12, rtol=0)


def sorted_pairs(order: list[int]) -> PairLogprobs:
    """Three pairs in some order: policy margins 3, -1, 1; reference margins 0, 2, -1; log-ratios of the chosen
    -1, 0, 2 and of the rejected -4, 3, 0."""
    rows = [[-3.0, -4.0, -1.0], [-6.0, -3.0, -2.0], [-2.0, -4.0, -3.0], [-2.0, -6.0, -2.0], [1.0] * 3, [1.0] * 3]
    return PairLogprobs(*(torch.tensor(row, dtype=torch.float64)[order] for row in rows))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
def test_optimal_transport_pairs_by_rank(order: list[int]) -> None:
    # policy 3, -1, 1 are third, first, second: against the reference's 2, -1, 0 they are 1, 0, 1 above
    expected = torch.tensor([0.313261688, 0.693147181, 0.313261688], dtype=torch.float64)[order]
    assert_close(LOSSES["aot"](sorted_pairs(order), beta=1.0), expected, atol=1e-8, rtol=0)
    # chosen -1, 0, 2 against rejected -4, 0, 3: 3, 0, -1
    expected = torch.tensor([0.048587352, 0.693147181, 1.313261688], dtype=torch.float64)[order]
    assert_close(LOSSES["aot_unpaired"](sorted_pairs(order), beta=1.0), expected, atol=1e-8, rtol=0)


def test_small_exponents_are_simpo() -> None:
    free = LOSSES["simpo"](pairs(), beta=2.0, simpo_gamma=0.3)
    assert torch.equal(LOSSES["alphapo"](pairs(), beta=2.0, alpha=0.0, simpo_gamma=0.3), free)
    assert_close(LOSSES["alphapo"](pairs(), beta=2.0, alpha=1e-7, simpo_gamma=0.3), free, atol=1e-6, rtol=0)


def test_a_sum_of_losses() -> None:
    # 2 L(2) + (0.7 - 0.5)^2 / 2 and 2 L(-2) + (-0.75 - 0.5)^2 / 2
    total = weighted(["sigmoid", "ipo"], [2.0, 0.5], {"beta": 1.0, "label_smoothing": 0.0})
    expected = torch.tensor([2 * 0.126928011 + 0.5 * 0.04, 2 * 2.126928011 + 0.5 * 1.5625], dtype=torch.float64)
    assert_close(total(pairs()), expected, atol=1e-8, rtol=0)


def test_the_likelihood_of_the_chosen_counts_every_token() -> None:
    """Whatever weight LD-DPO gives to its tail."""
    assert LOSSES["sft"](pairs(whole_chosen_B=torch.tensor([-3.0, -8.0]))).tolist() == [1.5, 2.0]


def test_a_divergence_reaches_the_losses_of_the_margin() -> None:
    # 1 - e^-1 - (1 - e) = e - 1/e = 2.350402387, per token (1 - 1/e)/2 - (1 - e)/5 = 0.659716645
    values = pairs(divergence=forward_kl)
    for name, beta, expected in (
        ("sigmoid", 1.0, 0.091056413),  # L(2.350402387)
        ("hinge", 0.1, 0.764959761),
        ("sigmoid_norm", 1.0, 0.416733255),  # L(0.659716645)
        ("ipo", 0.5, 0.115792762),  # (0.659716645 - 1)^2
    ):
        assert float(LOSSES[name](values, beta=beta)[0]) == pytest.approx(expected, abs=1e-8)
    # nothing else changes
    assert torch.equal(LOSSES["apo_zero"](values, beta=1.0), LOSSES["apo_zero"](pairs(), beta=1.0))
    assert f_divergence_of("forward_kl", 0.5) is forward_kl


def test_implicit_rewards_and_margins() -> None:
    chosen, rejected = pairs().log_ratios()
    assert chosen.tolist() == [1.0, -1.0] and rejected.tolist() == [-1.0, 1.0]
    assert pairs().margins().tolist() == [2.0, -2.0]
    assert {name for name, loss in PREFERENCE_LOSSES.items() if loss.reward is None and not loss.reference} == {
        "sft", "cpo", "cpo_hinge", "tpo", "tpo_hinge"
    }  # fmt: skip
    # of a token, and AlphaPO's 1 - e, 1 - e and 1 - e, 1 - e^1.5
    for name, expected in (("simpo", [-1.0, -1.0, -1.0, -1.5]), ("alphapo", [-1.71828183] * 3 + [-3.48168907])):
        reward = PREFERENCE_LOSSES[name].reward_with({"alpha": 1.0, "beta": 9.0})
        assert reward is not None
        assert torch.stack(reward(pairs())).t().flatten().tolist() == pytest.approx(expected, abs=1e-8)


FAR = {"beta": 0.5, "label_smoothing": 0.1}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("tokens", [1.0, 500.0])
def test_extreme_margins_stay_finite(name: str, tokens: float) -> None:
    """Sums of -1e4 on either side, in float32: losses and gradients are numbers, and so is every metric."""
    loss = PREFERENCE_LOSSES[name]
    sums = [torch.tensor(row) for row in ([-1e4, 0.0, -1e4], [0.0, -1e4, -1e4], [0.0, 0.0, -1.0], [0.0, 0.0, -2.0])]
    leaves = [row.requires_grad_() for row in sums[:2]]
    counts = torch.full((3,), tokens)
    far = PairLogprobs(*leaves, *sums[2:], counts, counts, gold_B=torch.full((3,), -1e4), gold_tokens_B=counts)
    losses = loss.with_settings(FAR)(far)
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    reward = loss.reward_with({"alpha": 0.25})
    logged = [metric(far) for metric in loss.metrics.values()] + list(reward(far) if reward else far.log_ratios())
    for values in [losses, *logged, *(one for one in gradients if one is not None)]:
        assert values.isfinite().all(), values


@pytest.mark.parametrize("kind", F_DIVERGENCES)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust"])
def test_extreme_margins_under_every_divergence(name: str, kind: str) -> None:
    sums = [torch.tensor(row) for row in ([-1e4, 0.0], [0.0, -1e4], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0], [9.0, 9.0])]
    leaves = [row.requires_grad_() for row in sums[:2]]
    far = PairLogprobs(*leaves, *sums[2:], divergence=f_divergence_of(kind, 0.5))
    losses = PREFERENCE_LOSSES[name].with_settings(FAR)(far)
    for values in [losses, *torch.autograd.grad(losses.sum(), leaves)]:
        assert values.isfinite().all(), values


def test_an_extreme_margin_is_exact() -> None:
    # -log sigmoid(-1e6) = 1e6 exactly; a plain log(sigmoid) would be -inf
    far = PairLogprobs(*(torch.tensor([value]) for value in (-1e6, 0.0, 0.0, 0.0, 1.0, 1.0)))
    assert LOSSES["sigmoid"](far, beta=1.0).item() == 1e6


def test_extremes_have_gradients() -> None:
    """A completion of probability 1, and a margin far below what an exponential holds."""
    sure = torch.zeros(1, requires_grad=True)
    known = [torch.tensor([value]) for value in (-3.0, 0.0, 0.0, 1.0, 2.0)]
    (slope,) = torch.autograd.grad(LOSSES["orpo"](PairLogprobs(sure, *known), beta=0.5).sum(), sure)
    assert slope.isfinite().all()
    far = torch.tensor([-900.0], requires_grad=True)
    loss = LOSSES["discopop"](PairLogprobs(far, *(torch.zeros(1) for _ in range(3)), *known[3:]), beta=0.1)
    # blend s(-1800) = e^-1800 times e^90: nothing; the logistic part is 90
    assert float(loss.detach()) == pytest.approx(90.0)
    (slope,) = torch.autograd.grad(loss.sum(), far)
    assert float(slope) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("name", "smoothing", "message"),
    [
        ("sigmoid", 0.5, r"label_smoothing must lie in \[0, 0.5\), found 0\.5"),
        ("exo_pair", 0.0, r"exo_pair needs a label_smoothing in \(0, 0.5\), found 0\.0"),
    ],
)
def test_label_smoothing_out_of_range_is_refused(name: str, smoothing: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name](pairs(), beta=0.1, label_smoothing=smoothing)


def test_a_gold_completion_is_asked_for() -> None:
    without = PairLogprobs(*(torch.tensor(row) for row in ROWS))
    with pytest.raises(ValueError, match="third completion of triple preferences"):
        LOSSES["tpo"](without, beta=0.1)
