"""A step's loss, gradient and metrics are sums over its rows, under every objective and however they are batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from stages.losses.f_divergence import F_DIVERGENCES, f_divergence_of
from stages.losses.pair_logprobs import PairLogprobs
from stages.losses.policy import POLICY_LOSSES
from stages.losses.preference import PREFERENCE_LOSSES, weighted
from stages.losses.supervised import SUPERVISED_LOSSES
from stages.losses.unpaired import UNPAIRED_LOSSES
from stages.training.a2po import AdvantageRegression, Regressed
from stages.training.batch import Branch, Group
from stages.training.language_modeling import RowSettings, TokenLoss
from stages.training.model import Scorer
from stages.training.nash_md import NashMdLoss
from stages.training.online_loss import JudgedPair, OnlinePairLoss
from stages.training.pairs import Reference, RewardLoss
from stages.training.policy import PolicyLoss
from stages.training.policy_known import Rollouts
from stages.training.policy_terms import PolicySettings
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.process_reward import StepLabels, StepLoss
from stages.training.unpaired import Judged, UnpairedLoss
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_self_distillation import summed

ROWS = 4
FIELDS = {"beta": 0.3, "label_smoothing": 0.1}
Case = tuple[Any, Callable[[], list[Group]]]


def groups_of(branches: int, data: Callable[[int], Any]) -> Callable[[], list[Group]]:
    return lambda: [
        replace(group, data=data(index)) for index, group in enumerate(random_groups(ROWS, branches, seed=2))
    ]


def of_pairs(name: str, **variant: Any) -> Case:
    loss = PREFERENCE_LOSSES[name]
    reward = loss.reward_with({"alpha": 0.25}) or PairLogprobs.log_ratios
    settings = PairSettings(0.3, reward=reward, metrics=loss.metrics, **variant)
    rows = groups_of(3 if loss.gold else 2, lambda index: Reference(-9.0 - index, -8.0))
    return PreferenceLoss(weighted([name], [1.0], FIELDS), settings), rows


def step_rows() -> list[Group]:
    """One sequence a row, judged at two of its tokens."""
    rows = []
    for index, group in enumerate(random_groups(ROWS, 1, seed=3)):
        ids = [*group.prefix_ids, *group.branches[0].token_ids, 5]
        branch = Branch(ids, [False] * len(ids))
        rows.append(Group(group.row_id, (), (branch,), StepLabels((0, len(ids) - 1), (index % 2 == 0, True))))
    return rows


def explored_pairs() -> Case:
    """Every third is told apart; of the others only the exploration counts."""

    def data(index: int) -> JudgedPair:
        exploration = (0.0, 0.1) if index % 2 else (0.1, 0.0)
        return JudgedPair(-9.0 - index, -8.0, rewards=(1.0, float(index % 3 > 0)), exploration=exploration)

    loss = OnlinePairLoss(weighted(["sigmoid"], [1.0], FIELDS), PairSettings(0.3), explores=True)
    return loss, groups_of(2, data)


def of_nash_md() -> Case:
    """Every token with a log-probability of the reference."""

    def rows() -> list[Group]:
        groups = random_groups(ROWS, 1, seed=2)
        references = [[-1.0 - 0.5 * place for place in range(len(group.branches[0].token_ids))] for group in groups]
        return [
            replace(group, data=Rollouts((0.3 - 0.2 * index,), ([],), reference_logprobs=(reference,)))
            for index, (group, reference) in enumerate(zip(groups, references, strict=True))
        ]

    return NashMdLoss(0.3), rows


CASES: dict[str, Case] = {
    "explored pairs": explored_pairs(),
    "nash_md": of_nash_md(),
    "advantage_regression": (AdvantageRegression(0.2), groups_of(1, lambda index: Regressed(0.4 - index, -8.0))),
    **{name: of_pairs(name) for name, loss in PREFERENCE_LOSSES.items() if not loss.couples_rows},
    **{
        f"sigmoid under {kind}": of_pairs("sigmoid", divergence=f_divergence_of(kind, 0.5), ld_alpha=0.25)
        for kind in F_DIVERGENCES
    },
    "weighted pairs": of_pairs("hinge", use_weighting=True),
    **{
        name: (
            UnpairedLoss(loss.with_settings(FIELDS | {"undesirable_weight": 2.0}), 0.3, ("kl", "delta")),
            groups_of(1, lambda index: Judged(index % 3 != 1, -4.0, density=0.5 + index, kl=0.2, shift=0.1)),
        )
        for name, loss in UNPAIRED_LOSSES.items()
    },
    **{
        name: (TokenLoss(loss.function), groups_of(2, lambda index: RowSettings(0.5 + index)))
        for name, loss in SUPERVISED_LOSSES.items()
    },
    "rewards": (RewardLoss(0.1), groups_of(2, lambda index: 0.5 * index)),
    "rewards of steps": (StepLoss(), step_rows),
}


@pytest.fixture(scope="module")
def scorers() -> dict[str, Scorer]:
    """By what stands in the place of the head."""
    base = tiny_model()
    values = base.config.to_dict()
    torch.manual_seed(3)
    rewards = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**values | {"num_labels": 1}))
    steps = AutoModelForTokenClassification.from_config(AutoConfig.for_model(**values | {"num_labels": 2}))
    made = {"words": base, "rewards": rewards, "rewards of steps": steps}
    return {name: packing_scorer(model.eval()).double() for name, model in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_rows_in_one_batch_in_two_and_alone(scorers: dict[str, Scorer], case: str) -> None:
    objective, rows = CASES[case]
    scorer, groups = scorers.get(case, scorers["words"]), rows()
    exact = 1e-9 if case not in scorers else 1e-6  # scores come in float32
    loss, slopes, totals = summed(objective, scorer, [groups])
    for batches in ([groups[2:], groups[:2]], [[group] for group in groups]):
        other, other_slopes, other_totals = summed(objective, scorer, batches)
        assert_close(other, loss, rtol=exact, atol=exact)
        for one, two in zip(other_slopes, slopes, strict=True):
            assert_close(one, two, rtol=100 * exact, atol=exact)
        assert totals.keys() == other_totals.keys()
        for name, total in totals.items():
            assert other_totals[name] == pytest.approx(total, rel=10 * exact, abs=exact), name


def _masked(group: Group) -> Group:
    """Of whose tokens none is asked for."""
    branches = tuple(Branch(one.token_ids, [False] * len(one.token_ids)) for one in group.branches)
    return replace(group, branches=branches)


def of_policies(name: str, old: bool) -> Case:
    """Completions of two prompts; of the second one nothing is asked for."""

    def rollouts(group: Group) -> Group:
        lengths = [branch.asked for branch in group.branches]
        told = tuple([-2.0] * length for length in lengths)
        earlier = tuple([-2.2] * length for length in lengths) if old else None
        return replace(group, data=Rollouts((0.5, -0.5), told, earlier, reference_logprobs=told))

    def rows() -> list[Group]:
        first, second, *_ = random_groups(ROWS, 2, seed=2)
        return [rollouts(first), rollouts(_masked(second))]

    loss, parameters = POLICY_LOSSES[name], {"epsilon_high": 5.0} if name == "cispo" else {}
    threshold = 0.5 if old else None
    settings = PolicySettings(loss, 1.0, 8, None, parameters, beta=0.1, off_policy_mask_threshold=threshold)
    return PolicyLoss(settings), rows


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "gmpo", "vespo", "cispo"])
def test_rows_of_which_nothing_is_asked_alone(scorers: dict[str, Scorer], name: str, old: bool) -> None:
    """A micro-batch without a token adds nothing, and is none that divides by its tokens."""
    objective, rows = of_policies(name, old)
    groups = rows()
    loss, slopes, totals = summed(objective, scorers["words"], [groups])
    other, other_slopes, other_totals = summed(objective, scorers["words"], [[group] for group in groups])
    alone, nothing, _ = summed(objective, scorers["words"], [groups[1:]])
    assert float(alone) == 0 and not any(one.any() for one in nothing)
    assert_close(other, loss, rtol=1e-9, atol=1e-9)
    for one, two in zip(other_slopes, slopes, strict=True):
        assert_close(one, two, rtol=1e-7, atol=1e-9)
    for metric, total in totals.items():
        if not metric.endswith(("/min", "/max")):
            assert other_totals[metric] == pytest.approx(total, rel=1e-8, abs=1e-9), metric
