"""Every objective that a recipe can name has a number by hand, a checked gradient, and does not depend on the batch.

Read off the tests themselves: a loss that is added without them fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from stages.losses import online, reward
from stages.losses.advantages import ADVANTAGES
from stages.losses.f_divergence import F_DIVERGENCES
from stages.losses.policy import POLICY_LOSSES
from stages.losses.policy_correction import MODES
from stages.losses.policy_kl import KL_ESTIMATORS
from stages.losses.policy_tokens import LOG_RATIOS
from stages.losses.preference import PREFERENCE_LOSSES
from stages.losses.sampled_distillation import SAMPLED_LOSSES
from stages.losses.supervised import SUPERVISED_LOSSES
from stages.losses.unpaired import UNPAIRED_LOSSES
from tests.losses import (
    test_advantages,
    test_f_divergence,
    test_online,
    test_policy,
    test_policy_ratios,
    test_preference,
    test_reward,
    test_sampled_distillation,
    test_supervised,
    test_unpaired,
)
from tests.training import test_objectives, test_pair_variants
from tests.training import test_policy as test_policy_steps
from tests.training import test_preference as test_steps
from tests.training import test_sampled_distillation as test_sampled_steps

Test = Callable[..., Any]
REWARD_LOSSES = [
    name for name, one in vars(reward).items() if inspect.isfunction(one) and one.__module__ == reward.__name__
]
ONLINE_LOSSES = [
    name
    for name, one in vars(online).items()
    if inspect.isfunction(one) and inspect.signature(one).return_annotation == "Tensor"
]

OBJECTIVES: dict[str, tuple[Iterable[str], list[Test], list[Test], list[Test]]] = {
    # names; tests of values by hand, of gradients, of splitting the batch
    "preference": (
        PREFERENCE_LOSSES,
        [test_preference.test_values],
        [test_preference.test_gradients],
        [
            test_preference.test_pairs_do_not_see_each_other,
            test_steps.test_pairs_of_a_step_are_compared_whatever_the_micro_batch,
        ],
    ),
    "unpaired": (
        UNPAIRED_LOSSES,
        [test_unpaired.test_values],
        [test_unpaired.test_gradients],
        [test_unpaired.test_completions_do_not_see_each_other],
    ),
    "supervised": (
        SUPERVISED_LOSSES,
        [test_supervised.test_values],
        [test_supervised.test_gradients],
        [test_supervised.test_tokens_do_not_see_each_other],
    ),
    "reward": (
        REWARD_LOSSES,
        [test_reward.test_values],
        [test_reward.test_gradients],
        [test_reward.test_rows_do_not_see_each_other],
    ),
    "on line": (
        ONLINE_LOSSES,
        [test_online.test_values],
        [test_online.test_gradients],
        [test_online.test_rows_do_not_see_each_other],
    ),
    "policy": (
        POLICY_LOSSES,
        [test_policy.test_values],
        [test_policy.test_gradients],
        [test_policy.test_sequences_do_not_see_each_other, test_policy_steps.test_cutting_up_a_step_changes_nothing],
    ),
    "policy gradient of distillation": (
        SAMPLED_LOSSES,
        [test_sampled_distillation.test_values],
        [test_sampled_steps.test_loss_and_gradients],
        [
            test_sampled_distillation.test_completions_do_not_see_each_other,
            test_sampled_steps.test_cutting_up_a_step_changes_nothing,
        ],
    ),
    "divergence from the reference": (
        KL_ESTIMATORS,
        [test_policy_ratios.test_kl_values],
        [test_policy_ratios.test_kl_gradients_token_by_token],
        [test_policy_ratios.test_kl_gradients_token_by_token],
    ),
    "f-divergence": (
        F_DIVERGENCES,
        [test_f_divergence.test_a_log_ratio_of_one],
        [test_f_divergence.test_gradients],
        [test_f_divergence.test_log_ratios_do_not_see_each_other],
    ),
    "variant": (
        test_pair_variants.VARIANTS,
        [test_pair_variants.test_values],
        [test_pair_variants.test_gradients],
        [test_pair_variants.test_pairs_do_not_see_each_other],
    ),
}


def tried(tests: Iterable[Test]) -> set[Any]:
    """What the first parameter of parametrized tests goes through."""
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    assert marks
    return {value[0] if isinstance(value, tuple) else value for mark in marks for value in mark.args[1]}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_name_is_tried(kind: str) -> None:
    names, *tests = OBJECTIVES[kind]
    assert set(names)
    for what, found in zip(("value by hand", "gradient", "split of the batch"), tests, strict=True):
        assert set(names) - tried(found) == set(), f"{kind} without a test of its {what}"


MOVING_REFERENCE = (
    # sync_ref_model (TR-DPO) is no function of log-probabilities: a mixture by hand, no gradient and one pair at a
    # time, the same bits after an interruption
    test_steps.test_a_reference_goes_part_of_the_way,
    test_steps.test_a_moving_reference_looks_at_one_pair_at_a_time,
    test_steps.test_a_reference_that_follows_resumes_with_the_same_bits,
)


OF_NUMBERS: dict[str, tuple[Iterable[str], list[Test]]] = {
    # what has no gradient of its own: names, tests of values by hand
    "advantage": (ADVANTAGES, [test_advantages.test_values]),
    "preference": (online.PREFERENCES, [test_online.test_preferences]),
    "ratio": (LOG_RATIOS, [test_policy_ratios.test_log_ratios]),
    "correction": (MODES, [test_policy_ratios.test_corrections]),
    "way through the objective, on policy and off it": (POLICY_LOSSES, [test_policy_steps.test_losses]),
    "ratio of 1 on policy": (POLICY_LOSSES, [test_policy_steps.test_on_policy_every_ratio_is_exactly_one]),
    "ratio in the objective": (LOG_RATIOS, [test_objectives.test_policy]),
}


@pytest.mark.parametrize("kind", OF_NUMBERS)
def test_every_number_is_tried(kind: str) -> None:
    names, tests = OF_NUMBERS[kind]
    assert set(names) and set(names) <= tried(tests), f"{kind} without a test"


def test_reward_losses_are_found() -> None:
    assert set(REWARD_LOSSES) == {"bradley_terry", "step_cross_entropy"}
    assert set(ONLINE_LOSSES) == {"explored", "nash_md", "advantage_regression"}
