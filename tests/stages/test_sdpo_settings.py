"""The settings of the stage `sdpo`: what it refuses, and why."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stages.sdpo import Config, check
from stages.training.self_teaching_settings import SelfTeachingConfig

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"distillation_alpha": 0.5}, r"distillation_alpha is 0.5, but sampled_token estimates KL\(policy \|\| teacher\)"),
    ({"distillation_mode": "topk_logits"}, r"topk_logits needs distillation_topk"),
    ({"distillation_topk": 5}, r"distillation_topk is of distillation_mode topk_logits; sampled_token has none"),
    (
        {"distillation_mode": "full_logits", "distillation_add_tail": True},
        r"distillation_add_tail is of .* full_logits",
    ),
    (
        {"teacher_model_kind": "live", "teacher_sync_steps": 2},
        r"teacher_sync_steps is of teacher_model_kind ema, not of",
    ),
    ({"lora_r": 4}, r"ema needs the whole model trained, and with lora_r only adapters are; give base, or live"),
    ({"use_successful_as_teacher": False}, r"the teacher would see no more than the policy"),
    (
        {"feedback_column": "said", "feedback_function": "a.py:b"},
        r"feedback_column and feedback_function exclude each other",
    ),
    ({"feedback_function": "judge"}, r"feedback_function names 'judge', but none is built in; give file.py:name"),
    ({"reprompt_template": "{prompt}{feedback}"}, r"reprompt_template has no \{solution\}"),
    (
        {"reprompt_template": "{prompt}{solution}", "feedback_column": "said"},
        r"reprompt_template has no \{feedback\}, so the teacher would not see the feedback",
    ),
    ({"feedback_template": "{feedback_raw}"}, r"feedback_template is given, but there is neither feedback_column nor"),
    (
        {
            "feedback_column": "said",
            "use_successful_as_teacher": False,
            "solution_template": "{successful_previous_attempt}",
        },
        r"solution_template is of solutions, which use_successful_as_teacher: false leaves out",
    ),
    ({"loss_type": "grpo"}, r"loss_type is of the policy's loss, which distillation_weight 1 leaves out"),
    ({"scale_rewards": "none"}, r"scale_rewards is of advantages, which distillation_weight 1 leaves out; give less"),
    ({"distillation_weight": 0.0, "max_reprompt_len": 99}, r"max_reprompt_len is given, but distillation_weight is 0"),
    ({"train_batch_size": 12}, r"train_batch_size 12 is no multiple of num_generations 8"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = check(Config(rewards=["exact_match"], **settings), frozenset({"model", "dataset"}))
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"reprompt_template": "{solution}"},
            "takes the field prompt, and may have solution and feedback; found solution",
        ),
        ({"reprompt_template": "{prompt}{other}"}, "found prompt, other"),
        ({"solution_template": "it"}, "takes the field successful_previous_attempt; found none"),
        ({"feedback_template": "{feedback_raw}}"}, "a lone brace"),
    ],
)
def test_templates(template: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTeachingConfig(**template)
