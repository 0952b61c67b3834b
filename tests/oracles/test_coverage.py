"""Every objective stands beside TRL's own, or there is none; and whatever TRL 1.16 can name is here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

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
from tests.losses.test_coverage import ONLINE_LOSSES, REWARD_LOSSES
from tests.oracles import (
    test_trl_distillation,
    test_trl_online,
    test_trl_policy,
    test_trl_preference,
    test_trl_reference_free,
    test_trl_supervised,
    test_trl_unpaired,
)

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")

FREE = (test_trl_reference_free.test_cpo, test_trl_reference_free.test_tpo)
NOT_IN_TRL = {
    "bco": "its trainer was removed before 1.16; the step is checked against plain tensors in tests/training",
    "step_cross_entropy": "the trainer of process reward models was removed before 1.16; the step is checked against "
    "transformers' own loss in tests/stages/test_process_reward_model.py",
    "explored": "the trainer of XPO was removed before 1.16; the step is checked against plain tensors in "
    "tests/stages/test_online_dpo.py",
    "nash_md": "its trainer was removed before 1.16; the step is checked against plain tensors in "
    "tests/stages/test_nash_md.py",
    "minillm": "its trainer was removed before 1.16; that it is the gradient of the divergence of completions is "
    "checked in tests/losses/test_sampled_distillation.py",
    "gspo_token": "its trainer was removed before 1.16; in value it is gspo, and its gradient is checked by hand",
}
BESIDE_THE_TABLE = {
    # tests that try one loss each
    "sft": test_trl_preference.test_likelihood_term_differs_by_lengths,
    "orpo": test_trl_reference_free.test_orpo,
    "bradley_terry": test_trl_supervised.test_reward_model,
    "advantage_regression": test_trl_online.test_a2po,
    "iw_opd": test_trl_distillation.test_iw_opd,
}


def tried(test: Callable[..., Any]) -> list[Any]:
    """The cases of a parametrized test; of several parametrizations the outermost."""
    *_, mark = (mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize")
    return list(mark.args[1])


def of_dpo() -> set[str]:
    """Losses that are compared with those of TRL's DPO trainer."""
    return {name for names, _ in tried(test_trl_preference.test_dpo) for name in names}


def compared() -> set[str]:
    """Losses that a test compares with TRL's."""
    free = {case[0] for test in FREE for case in tried(test)}
    policy = {name for name, *_ in tried(test_trl_policy.test_losses)}
    return policy | free | of_dpo() | set(tried(test_trl_supervised.test_sft)) | set(tried(test_trl_unpaired.test_kto))


def test_every_loss_has_its_oracle_or_a_reason() -> None:
    known = {*PREFERENCE_LOSSES, *UNPAIRED_LOSSES, *SUPERVISED_LOSSES, *REWARD_LOSSES, *POLICY_LOSSES, *ONLINE_LOSSES}
    assert compared() | set(BESIDE_THE_TABLE) | set(NOT_IN_TRL) == known | set(SAMPLED_LOSSES)
    assert not set(NOT_IN_TRL) & (compared() | set(BESIDE_THE_TABLE))


def test_every_variant_has_its_oracle() -> None:
    cases = [given for _, given in tried(test_trl_preference.test_dpo)]
    assert {given.get("f_divergence_type", "reverse_kl") for given in cases} == set(F_DIVERGENCES)
    assert {name for given in cases for name in given} >= {"ld_alpha", "use_weighting", "label_smoothing"}


NOT_TRLS = {
    # of on-line learning: not in TRL 1.16 at all
    "advantage": {"reinforce_plus_plus_baseline"},
    "ratio": {"sequence_token"},
    "divergence": {"k2"},
    "correction": {"geometric_truncate", "geometric_mask"},
}


def test_every_part_of_on_line_learning_has_its_oracle() -> None:
    cases = [(others, theirs) for _, _, others, theirs in tried(test_trl_policy.test_losses)]
    levels = {given.get("importance_sampling_level", "token") for one in cases for given in one}
    # RLOO's ratio of sequences, its k1 off the rewards and its advantages have tests of their own
    beside = {
        "sequence_sum": test_trl_policy.test_rloo,
        "rloo": test_trl_policy.test_advantages_of_rloo,
        "grpo": test_trl_policy.test_advantages_of_grpo,
        "k1": test_trl_policy.test_advantages_of_rloo,
        "k3": test_trl_policy.test_losses,
    }
    assert levels | set(beside) | NOT_TRLS["ratio"] >= set(LOG_RATIOS)
    assert set(beside) | NOT_TRLS["advantage"] >= set(ADVANTAGES)
    assert set(beside) | NOT_TRLS["divergence"] >= set(KL_ESTIMATORS)
    modes = tried_of(test_trl_policy.test_importance_to_the_sampler, "mode")
    assert set(modes) | NOT_TRLS["correction"] == set(MODES)


def tried_of(test: Callable[..., Any], parameter: str) -> list[Any]:
    """What one parameter of a test goes through."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    (found,) = (list(mark.args[1]) for mark in marks if mark.args[0] == parameter)
    return found


def named(source: Any, attribute: str) -> set[str]:
    """What TRL's code compares an attribute with."""
    text = inspect.getsource(source)
    lists = re.findall(rf"{attribute} in \[([^\]]+)\]", text)
    return set(re.findall(rf'{attribute} == "([\w-]+)"', text)) | set(re.findall(r'"([\w-]+)"', " ".join(lists)))


def test_whatever_trl_names_is_here() -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.tpo import TPOTrainer

    grpo, sampling = trl.GRPOTrainer._compute_loss, trl.GRPOTrainer._generate_and_score_completions
    assert named(grpo, "self.loss_type") <= set(POLICY_LOSSES) and "luspo" in named(grpo, "self.loss_type")
    assert named(grpo, "self.importance_sampling_level") == {"token", "sequence"} <= set(LOG_RATIOS)
    assert named(sampling, "self.vllm_importance_sampling_mode") == set(MODES) - NOT_TRLS["correction"]
    assert named(sampling, "self.scale_rewards") == {"group", "batch", "none"}
    dpo = trl.DPOTrainer._compute_loss
    assert named(dpo, "loss_type") == of_dpo() | {"sft"}
    assert named(dpo, "self.f_divergence_type") == set(F_DIVERGENCES)
    assert named(trl.KTOTrainer._compute_loss, "self.loss_type") == set(UNPAIRED_LOSSES) - set(NOT_IN_TRL)
    theirs = {case[1]["loss_type"] for case in tried(FREE[0])}
    assert named(CPOTrainer.cpo_loss, "self.loss_type") == theirs
    theirs = {case[1]["loss_type"] for case in tried(FREE[1])}
    assert named(TPOTrainer._compute_loss, "self.loss_type") == theirs
