"""SDPO against TRL's own code: the loss of a step on the same tokens, and the prompts that its teacher is shown.

TRL's loss goes over padded rows of logits, ours over packed ones. Its policy's loss divides by the tokens of a
micro-batch; the step here is one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.data.tokenize import TokenizedPrompt
from stages.losses.distillation import divergence_of
from stages.losses.policy import POLICY_LOSSES
from stages.losses.self_distillation import OwnTop, own_top_divergence
from stages.rollouts.requests import Completion
from stages.sdpo import Config
from stages.training.batch import Group
from stages.training.lesson import lesson_metrics
from stages.training.lessons import Lessons
from stages.training.model import Scorer
from stages.training.policy_terms import PolicySettings
from stages.training.rollout_records import Sampled
from stages.training.self_distillation import SelfDistillationLoss, SelfTeaching
from stages.training.self_teacher import SelfTeacher
from stages.training.taught_rollouts import TaughtRollouts, taught_step
from tests.oracles.policy_steps import OneProcess
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import gradients, plain_logprobs

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")
from trl.experimental.sdpo import loss_utils  # noqa: E402
from trl.experimental.sdpo.sdpo_trainer import (  # noqa: E402
    SDPOTrainer,
    SuccessfulRolloutTeacherContextBuilder,
)

TEMPERATURE = 0.8
Named = dict[str, Any]
# TRL's settings of the distillation
CASES: dict[str, Named] = {
    "sampled token": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "all, forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "all, between": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "all, reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "likeliest": {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.5},
    "likeliest, forward": {"distillation_mode": "topk_logits", "distillation_topk": 3, "distillation_alpha": 0.0},
    "likeliest and tail": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 5,
        "distillation_alpha": 1.0,
        "distillation_add_tail": True,
    },
    "without importance": {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "distillation_is_clip": None},
}


@pytest.fixture(scope="module")
def models() -> tuple[Scorer, Scorer]:
    """A policy, and a teacher with other weights."""
    teacher = packing_scorer(tiny_model()).double().requires_grad_(False)
    policy = packing_scorer(tiny_model()).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return policy, teacher


def taught_groups(policy: Scorer, *, on_policy: bool) -> list[Group]:
    """Three groups of three; the teacher's prompts of a group go apart, and four completions have none."""
    groups = random_groups(3, 3)
    with torch.no_grad():
        logprobs = [row.tolist() for row in plain_logprobs(policy, groups, TEMPERATURE)]
    found = []
    for number, group in enumerate(groups):
        own = logprobs[3 * number : 3 * number + 3]
        old = tuple([value + 0.9 * (-1) ** place for place, value in enumerate(row)] for row in own)
        prompts = ([7, *group.prefix_ids, 9, 4], [], [7, *group.prefix_ids, 5])
        if number == 1:
            prompts = ([], [], [4, 4, *group.prefix_ids])
        data = TaughtRollouts(
            (1.0, -0.5, 0.25 + number),
            tuple(own),
            None if on_policy else old,
            teacher_prompts=tuple(map(list, prompts)),
            completions=3,
        )
        found.append(replace(group, data=data))
    return found


def ours(models: tuple[Scorer, Scorer], groups: list[Group], weight: float, given: Named) -> tuple[Tensor, Any, Any]:
    """(loss of the step, objective, groups as the step has them)."""
    policy, teacher = models
    whole = given["distillation_mode"] != "sampled_token"
    most = given.get("distillation_topk")
    teaching = SelfTeaching(
        weight,
        divergence_of(given["distillation_alpha"]) if whole else None,
        None if most is None else OwnTop(most, given.get("distillation_add_tail", False)),
        given.get("distillation_is_clip", 2.0),
    )
    settings = PolicySettings(POLICY_LOSSES[given.get("loss_type", "dapo")], TEMPERATURE, 8, None)
    objective = SelfDistillationLoss(settings, teaching, SelfTeacher(TEMPERATURE, teacher))
    step = taught_step(lambda groups, _: groups, objective.count, alone=weight == 1)(groups, False)
    items = sum(map(objective.count, step))
    kept = [group for group in step if group.data.taught or weight < 1]
    loss, metrics = objective(policy, policy.layout(kept))
    return loss / items, metrics, step


def theirs(models: tuple[Scorer, Scorer], groups: list[Group], weight: float, given: Named) -> tuple[Tensor, Named]:
    """TRL's loss and metrics."""
    policy, teacher = models
    trainer = SDPOTrainer.__new__(SDPOTrainer)
    settings = {"distillation_is_clip": 2.0, "distillation_add_tail": False, "distillation_topk": None, **given}
    trainer.args = SimpleNamespace(distillation_weight=weight, teacher_model_kind="base", **settings)
    trainer.use_teacher_server, trainer.temperature, trainer.model_kwarg_keys = False, TEMPERATURE, set()
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    trainer.importance_sampling_level, trainer.loss_type = "token", given.get("loss_type", "dapo")
    trainer.max_completion_length, trainer.current_gradient_accumulation_steps = 8, 1
    trainer.model, trainer.teacher_model, trainer.accelerator = policy.model.train(), teacher.model, OneProcess()
    trainer._metrics = {"train": defaultdict(list)}
    return trainer.compute_loss(policy.model, padded(groups)), trainer._metrics["train"]


def padded(groups: list[Group]) -> dict[str, Tensor]:
    rows = [
        (group.prefix_ids, branch.token_ids, group.data.teacher_prompts[place] or group.prefix_ids, group, place)
        for group in groups
        for place, branch in enumerate(group.branches)
    ]
    prompts, completions, seen = (_padded([row[field] for row in rows], left=field != 1) for field in range(3))
    found = {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "teacher_input_ids": torch.cat([seen[0], completions[0]], 1),
        "teacher_attention_mask": torch.cat([seen[1], completions[1]], 1),
        "self_distillation_mask": torch.tensor([float(bool(g.data.teacher_prompts[i])) for *_, g, i in rows]),
        "advantages": torch.tensor([group.data.advantages[place] for *_, group, place in rows], dtype=torch.float64),
    }
    if groups[0].data.old_logprobs is not None:
        values = [group.data.old_logprobs[place] for *_, group, place in rows]
        found["old_per_token_logps"] = _padded(values, left=False)[0].double()
    return found


def _padded(rows: list[Any], *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    values = [[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    masks = [[0] * len(more) + [1] * len(row) for row, more in zip(rows, fill, strict=True)]
    return torch.tensor(values), torch.tensor([mask if left else mask[::-1] for mask in masks])


@pytest.mark.parametrize(
    ("name", "weight", "on_policy"),
    [
        *((name, weight, False) for name in CASES for weight in (1.0, 0.4)),
        ("sampled token", 0.4, True),
        ("likeliest and tail", 0.4, True),
        ("all, between", 1.0, True),
    ],
)
def test_the_loss_of_a_step(models: tuple[Scorer, Scorer], name: str, weight: float, on_policy: bool) -> None:
    given, groups = CASES[name], taught_groups(models[0], on_policy=on_policy)
    expected, their_metrics = theirs(models, groups, weight, given)
    slopes = gradients(models[0], expected)
    loss, metrics, _ = ours(models, groups, weight, given)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(models[0], loss), slopes, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)
    for metric in ("distillation_loss", *(["policy_loss"] if weight < 1 else [])):
        (logged,) = their_metrics[f"self_distillation/{metric}"]
        mean = metrics[f"self_distillation/{metric}"]
        assert float(mean.sum) / float(mean.count) == pytest.approx(logged, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_the_policys_share(models: tuple[Scorer, Scorer], loss_type: str) -> None:
    """With every way of taking means, the distillation's stays the mean over completions."""
    given = CASES["sampled token"] | {"loss_type": loss_type}
    groups = taught_groups(models[0], on_policy=False)
    expected, _ = theirs(models, groups, 0.4, given)
    loss, *_ = ours(models, groups, 0.4, given)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_their_tail_of_a_sure_student_has_no_gradient() -> None:
    """Ours is the sum of the other probabilities, so that its slope is that of the whole divergence."""
    student = torch.tensor([[30.0, 5.0, 3.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = own_top_divergence(student, teacher, OwnTop(1, True), divergence_of(0.0)).sum()
    their = loss_utils.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=1, distillation_alpha=0.0, distillation_add_tail=True
    ).sum()
    (slope,), (their_slope,) = (torch.autograd.grad(one, student) for one in (found, their))
    # the student's forward KL has slope p - q: of the likeliest token 1 - q
    right = 1 - teacher.softmax(-1)[0, 0]
    assert_close(slope[0, 0], right, atol=1e-5, rtol=1e-5)
    assert abs(float(their_slope[0, 0]) - float(right)) > 0.5


@dataclass(frozen=True)
class Shown:
    """What a case has: prompt, texts of the completions, rewards, what is said of them, TRL's settings."""

    prompt: Any
    texts: list[str]
    rewards: list[float]
    feedback: list[str | None]
    settings: Named


CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+{x}?"},
]
PROMPTS: dict[str, Shown] = {
    "plain": Shown("1+1=", ["3", "2", "two", "2 "], [0.0, 1.0, 0.5, 1.0], [None] * 4, {}),
    "of several turns": Shown(CHAT, ["3", "4", "{5}", "4!"], [0.0, 2.0, 0.5, 0.0], [None] * 4, {}),
    "itself too": Shown(CHAT, ["3", "4"], [0.0, 2.0], [None] * 2, {"dont_reprompt_on_self_success": False}),
    "no success": Shown("1+1=", ["3", "4"], [0.0, 0.9], [None] * 2, {}),
    "thoughts": Shown(
        "1+1=",
        ["3", "<think>well\n</think> 2 <think>yes</think>"],
        [0.0, 1.0],
        [None] * 2,
        {"remove_thinking_from_demonstration": True},
    ),
    "feedback": Shown("1+1=", ["3", "2", "4"], [0.0, 1.0, 0.0], ["too much", " ", None], {}),
    "feedback alone": Shown(CHAT, ["3", "2"], [0.0, 1.0], ["too much", "fine"], {"use_successful_as_teacher": False}),
    "feedback without a solution": Shown(
        "1+1=", ["3", "2"], [0.0, 1.0], ["too much", "fine"], {"environment_feedback_only_without_solution": True}
    ),
    "another threshold": Shown("1+1=", ["3", "2"], [0.4, 0.1], [None] * 2, {"success_reward_threshold": 0.4}),
}


def their_prompts(case: Shown) -> tuple[list[Any], Named]:
    """TRL's prompts of the teacher, a completion that is not taught keeping its own, and its fractions."""
    fields = {
        name: value.default
        for name, value in Config.model_fields.items()
        if name.endswith("_template") or name in ("use_successful_as_teacher", "success_reward_threshold")
    }
    fields |= {
        "dont_reprompt_on_self_success": True,
        "remove_thinking_from_demonstration": False,
        "environment_feedback_only_without_solution": False,
        "include_environment_feedback": any(case.feedback),
    }
    codes = [[ord(character) for character in text] for text in case.texts]
    accelerator = SimpleNamespace(device="cpu", process_index=0, gather=lambda one: one)
    accelerator.pad_across_processes = lambda one, **_: one
    trainer = SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        num_generations=len(codes),
        args=SimpleNamespace(**(fields | case.settings)),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        processing_class=SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids))),
    )
    builder = SuccessfulRolloutTeacherContextBuilder(trainer)
    shown: list[Any] = []
    ids = torch.zeros(len(codes), 1, dtype=torch.long)
    builder._tokenize_teacher_messages = lambda prompts: (
        shown.extend(prompts) or {"prompt_ids": ids, "prompt_mask": ids}
    )
    completions, mask = _padded(codes, left=False)
    batch = {"completion_ids": completions, "completion_mask": mask}
    builder.build(batch, [case.prompt] * len(codes), torch.tensor(case.rewards), feedbacks=case.feedback)
    return shown, builder.last_metrics


@pytest.mark.parametrize("name", PROMPTS)
def test_what_the_teacher_is_shown(name: str) -> None:
    case = PROMPTS[name]
    expected, fractions = their_prompts(case)
    seen: list[Any] = []

    def encode(prompts: list[TokenizedPrompt]) -> list[list[int]]:
        seen.extend(prompt.row["prompt"] for prompt in prompts)
        return [[len(seen) - len(prompts) + place + 1] for place in range(len(prompts))]

    feedback = {"feedback_column": "said"} if any(case.feedback) else {}
    config = Config(rewards=["exact_match"], **case.settings, **feedback)
    sampled = Sampled(
        TokenizedPrompt("r0", [1], {"row_id": "r0", "prompt": case.prompt}),
        [Completion([1], [0.0], True) for _ in case.texts],
        case.texts,
        {},
        list(case.rewards),
    )
    lessons = Lessons(config, encode, 99, lambda _: [case.feedback])([sampled])[0].lessons
    found = [seen[one.teacher_ids[0] - 1] if one.teacher_ids else case.prompt for one in lessons]
    assert found == expected
    metrics = lesson_metrics([lessons])
    assert {name: metrics[name] for name in fractions} == pytest.approx(fractions)
