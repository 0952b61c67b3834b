"""From scored completions to advantages, as a stage's settings say, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stages.data.tokenize import TokenizedPrompt
from stages.losses.policy_kl import k1
from stages.rollouts.requests import Completion
from stages.training.advantage_settings import AdvantageConfig
from stages.training.advantages import RewardPenalty, advantages_of, penalized
from stages.training.batch import Branch, Group
from stages.training.policy_known import Rollouts
from stages.training.rollout_records import Sampled


def sampled(totals: list[float | None], **rewards: list[float | None]) -> Sampled:
    completions = [Completion([1], [-1.0], True) for _ in totals]
    return Sampled(TokenizedPrompt("r", [1], {}), completions, ["x"] * len(totals), rewards, totals)


CASES: list[tuple[dict[str, Any], list[float]]] = [
    # 0, 2 and 7: mean 3, squares 9 + 1 + 16 = 26, deviation sqrt 13
    ({}, [x / (math.sqrt(13) + 1e-4) for x in (-3, -1, 4)]),
    ({"scale_rewards": "none"}, [-3, -1, 4]),
    ({"advantage_estimator": "rloo"}, [0 - 4.5, 2 - 3.5, 7 - 1]),
    # -4.5, -1.5, 6: squares 20.25 + 2.25 + 36 = 58.5
    (
        {"advantage_estimator": "rloo", "normalize_advantages": True},
        [x / (math.sqrt(29.25) + 1e-4) for x in (-4.5, -1.5, 6)],
    ),
    # 1, 2, 3
    ({"reward_clip_range": (1.0, 3.0), "scale_rewards": "none"}, [-1, 0, 1]),
    # the only group: over its deviation as for grpo
    ({"advantage_estimator": "reinforce_plus_plus_baseline"}, [x / (math.sqrt(13) + 1e-4) for x in (-3, -1, 4)]),
]


@pytest.mark.parametrize(("settings", "expected"), CASES)
def test_of_totals(settings: dict[str, Any], expected: list[float]) -> None:
    (found,) = advantages_of(AdvantageConfig(**settings))([sampled([0.0, 2.0, 7.0])])
    assert found == pytest.approx(expected, abs=1e-12)


def test_what_nothing_scored_has_none() -> None:
    assert advantages_of(AdvantageConfig(scale_rewards="none"))([sampled([1.0, None, 3.0])]) == [[-1.0, 0.0, 1.0]]


def test_several_rewards_are_normalized_first() -> None:
    # -1, 1 over sqrt 2 each; the second reward counts twice and against the first
    config = AdvantageConfig(multi_objective_aggregation="normalize_then_sum", reward_weights=(1.0, 2.0))
    (found,) = advantages_of(config)([sampled([6.0, 2.0], big=[0.0, 100.0], small=[3.0, 1.0])])
    big, small = 50 / (math.sqrt(5000) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    first = 2 * small - big
    expected = first / (math.sqrt(2) * first + 1e-4)
    assert found == pytest.approx([expected, -expected], abs=1e-12)


def test_a_divergence_comes_off_the_reward() -> None:
    # log pi - log pi_ref: 0.5 and 0.1 + 0.3; 1 - 2 * 0.5 = 0 and 2 - 2 * 0.4 = 1.2; clipped before: 5 counts as 2
    data = {"old_logprobs": ([-1.0], [-0.4, -0.7]), "reference_logprobs": ([-1.5], [-0.5, -1.0])}

    def measure(groups: list[Group]) -> list[Group]:
        branches = (Branch([1]), Branch([1, 2]))
        return [Group("r", [1], branches, Rollouts(group.data.advantages, ([], []), **data)) for group in groups]

    config = AdvantageConfig(advantage_estimator="rloo", reward_clip_range=(0.0, 2.0))
    rewards, measured = penalized(config, RewardPenalty(2.0, k1), measure)
    (values,) = rewards([sampled([1.0, 5.0])])
    assert values == [1.0, 2.0]
    (group,) = measured([Group("r", [1], (), Rollouts(tuple(values), ([], [])))])
    assert group.data.advantages == pytest.approx((-1.2, 1.2), abs=1e-12)
