"""The objective of SDPO does not depend on how a step is batched or laid out, nor on what is not taught."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.losses.distillation import divergence_of
from stages.losses.policy import POLICY_LOSSES
from stages.losses.self_distillation import OwnTop
from stages.training.batch import Branch, Group
from stages.training.entropy_bonus import EntropyBonus
from stages.training.model import Scorer
from stages.training.policy_terms import PolicySettings
from stages.training.saved_groups import groups_from_json, groups_to_json
from stages.training.self_distillation import SelfDistillationLoss, SelfTeaching
from stages.training.self_teacher import SelfTeacher
from stages.training.taught_rollouts import TaughtRollouts, as_taught, taught_step
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import gradients

TEACHINGS = {
    "sampled token": SelfTeaching(0.6, None, None, 2.0),
    "sampled token alone": SelfTeaching(1.0, None, None, 2.0),
    "all tokens": SelfTeaching(0.6, divergence_of(0.3), None, 2.0),
    "all tokens alone": SelfTeaching(1.0, divergence_of(1.0), None, 2.0),
    "likeliest tokens": SelfTeaching(0.3, divergence_of(0.0), OwnTop(4, True), None),
}
LOSSES = ("dapo", "grpo", "gspo")


@pytest.fixture(scope="module")
def scorers() -> dict[str, Scorer]:
    """A policy in packed rows, the same in padded ones, and a teacher in both."""
    teacher = tiny_model("qwen3").double().requires_grad_(False)
    policy = tiny_model().double()
    return {
        "packed": packing_scorer(policy),
        "padded": Scorer(policy),
        "teacher": packing_scorer(teacher),
        "padded teacher": Scorer(teacher),
    }


def rows(*, on_policy: bool = False) -> list[Group]:
    """Prompts of the teacher that go apart at once, later, or not; branches and whole groups without one, and one of
    which some tokens are asked for."""
    made = []
    for number, group in enumerate(random_groups(4, 3, seed=4)):
        prompts = [[5, *group.prefix_ids, 8], [], [6, 6]] if number % 2 else [[4, 9], [4, 9], [4, *group.prefix_ids]]
        if number == 2:
            prompts = [prompts[0], prompts[2], prompts[1]]
        if number == 3:
            prompts = [[], [], []]
        lengths = [len(branch.token_ids) for branch in group.branches]
        if number == 0:
            ids = group.branches[0].token_ids
            mask = [place % 2 == 0 for place in range(len(ids))]
            group, lengths[0] = replace(group, branches=(Branch(ids, mask), *group.branches[1:])), sum(mask)
        old = tuple([-1.0 - 0.3 * place for place in range(length)] for length in lengths)
        data = TaughtRollouts(
            (1.0, -0.5, 0.25 * number), old, None if on_policy else old, teacher_prompts=tuple(prompts), completions=3
        )
        made.append(replace(group, data=data))
    return made


def objective_of(teaching: SelfTeaching, teacher: Scorer, loss: str = "dapo", **more: Any) -> SelfDistillationLoss:
    settings = PolicySettings(POLICY_LOSSES[loss], 0.8, 8, None)
    return SelfDistillationLoss(settings, teaching, SelfTeacher(0.8, teacher), **more)


def stepped(objective: SelfDistillationLoss, groups: list[Group], *, alone: bool) -> list[Group]:
    return taught_step(lambda groups, _: groups, objective.count, alone=alone)(groups, False)


def summed(
    objective: SelfDistillationLoss, scorer: Scorer, batches: list[list[Group]]
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    loss, totals = torch.zeros((), dtype=torch.float64), dict[str, list[float]]()
    for batch in batches:
        part, metrics = objective(scorer, scorer.layout(batch))
        loss = loss + part
        for name, mean in metrics.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + float(mean.sum), total[1] + float(mean.count)
    return loss, gradients(scorer, loss), totals


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", TEACHINGS)
def test_batches_and_layouts(scorers: dict[str, Scorer], name: str, on_policy: bool) -> None:
    """One batch, one a group, and padded rows of single branches: the same loss, gradients and metrics."""
    teaching = TEACHINGS[name]
    objective = objective_of(teaching, scorers["teacher"])
    groups = stepped(objective, rows(on_policy=on_policy), alone=False)
    loss, slopes, totals = summed(objective, scorers["packed"], [groups])
    assert loss.item() != 0
    other = objective_of(teaching, scorers["padded teacher"])
    # the models' norms are in float32, which rows of another layout round differently
    for one, scorer, batches, exact in (
        (objective, "packed", [[group] for group in groups], 1e-9),
        (objective, "packed", [groups[3:], groups[1:3], groups[:1]], 1e-9),
        (other, "padded", [groups], 1e-6),
    ):
        found, found_slopes, found_totals = summed(one, scorers[scorer], batches)
        assert_close(found, loss, atol=exact, rtol=exact)
        for slope, expected in zip(found_slopes, slopes, strict=True):
            assert_close(slope, expected, atol=exact, rtol=100 * exact)
        assert found_totals.keys() <= {*one.metric_names, *one.extremes}
        for metric, total in totals.items():
            assert found_totals[metric] == pytest.approx(total, rel=10 * exact, abs=exact), metric


@pytest.mark.parametrize("name", ["sampled token alone", "all tokens alone"])
def test_branches_without_a_teacher_need_not_be_computed(scorers: dict[str, Scorer], name: str) -> None:
    objective = objective_of(TEACHINGS[name], scorers["teacher"])
    whole, few = (stepped(objective, rows(), alone=alone) for alone in (False, True))
    assert [len(group.branches) for group in few] == [3, 2, 3, 3] and list(map(objective.count, few)) == [3.0] * 4
    few = [group for group in few if group.data.taught]
    loss, slopes, _ = summed(objective, scorers["packed"], [whole])
    found, found_slopes, _ = summed(objective, scorers["packed"], [few])
    assert_close(found, loss, atol=1e-9, rtol=1e-9)
    for slope, expected in zip(found_slopes, slopes, strict=True):
        assert_close(slope, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_both_losses_by_their_weights(scorers: dict[str, Scorer], loss: str) -> None:
    """Of the step: w x (mean over completions) + (1 - w) x rl's, however that divides."""
    policy, weight = scorers["packed"], 0.6

    def of(weight: float) -> tuple[Tensor, list[Tensor]]:
        objective = objective_of(SelfTeaching(weight, divergence_of(0.3), None, 2.0), scorers["teacher"], loss)
        groups = stepped(objective, rows(), alone=False)
        value, slopes, _ = summed(objective, policy, [groups])
        items = sum(map(objective.count, groups))
        return value / items, [slope / items for slope in slopes]

    (both, slopes), (taught, taught_slopes), (little, little_slopes) = of(weight), of(1.0), of(1e-12)
    assert_close(both, weight * taught + (1 - weight) * little, atol=1e-9, rtol=1e-9)
    for slope, one, other in zip(slopes, taught_slopes, little_slopes, strict=True):
        assert_close(slope, weight * one + (1 - weight) * other, atol=1e-9, rtol=1e-7)


def test_the_entropy_has_the_policys_weight(scorers: dict[str, Scorer]) -> None:
    groups = [replace(group, data=replace(group.data, entropy_share=0.5)) for group in rows()]
    found = []
    for bonus in (None, EntropyBonus(0.2, None)):
        objective = objective_of(TEACHINGS["sampled token"], scorers["teacher"], bonus=bonus)
        loss, _, totals = summed(objective, scorers["packed"], [stepped(objective, groups, alone=False)])
        assert "policy_loss" not in totals
        found.append(loss.item())
    # 0.4 of the loss is the policy's
    assert found[0] - found[1] == pytest.approx(0.4 * 0.2 * 0.5 * totals["entropy"][0], rel=1e-9)


def test_what_the_teacher_reads() -> None:
    """One group a prompt, so that a pass need not hold all that a group is shown; which completions it is of."""
    sources = rows()
    every = [
        (source.data.teacher_prompts[index], source.branches[index])
        for source in sources
        for index in source.data.taught
    ]
    groups = as_taught(sources)
    assert [group.data for group in groups] == [[0, 1], [2], [3], [4], [5, 7], [6]]
    for group in groups:
        for branch, number in zip(group.branches, group.data, strict=True):
            assert (group.prefix_ids, branch) == every[number]


def test_groups_are_saved_whole() -> None:
    groups = rows()
    assert groups_from_json(groups_to_json(groups), TaughtRollouts)[1].data == groups[1].data


def test_adapters_cannot_be_followed() -> None:
    """Those that input model brings: the stage's check has seen lora_r before."""
    model = tiny_model()
    adapted = Scorer(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    trainer: Any = SimpleNamespace(scorer=adapted, config=SimpleNamespace(bf16=False))
    config: Any = SimpleNamespace(teacher_model_kind="ema")
    with pytest.raises(
        StageError, match=r"ema needs the whole model trained, .* merge it first, or give base, or live"
    ):
        SelfTeacher(1.0).join(trainer, config)
