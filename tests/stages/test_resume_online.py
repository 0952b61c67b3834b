"""Every stage that trains on what is sampled meanwhile, interrupted and run again: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.rollouts.rewards import RewardSet
from tests.stages.interruptions import assert_same, killed_in
from tests.stages.resuming import Case, context_of, interrupt_thrice, run, save_inputs
from tests.stages.small_models import output

CASES: dict[str, Case] = {
    "grpo": (
        "rl",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 6,
            "num_generations": 3,
            "max_completion_length": 4,
            "steps_per_generation": 2,
            "eval_steps": 2,
            "keep": "best",
        },
    ),
    "a policy that teaches itself": (
        "sdpo",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 6,
            "num_generations": 3,
            "max_completion_length": 4,
            "num_iterations": 2,
            "success_reward_threshold": 0.5,
            "distillation_weight": 0.7,
            "distillation_mode": "full_logits",
            "distillation_alpha": 0.5,
            "teacher_update_rate": 0.3,
            "reprompt_template": "{prompt}{solution}{feedback}",
            "solution_template": "h{successful_previous_attempt}",
            "feedback_column": "completion",
            "feedback_template": "g{feedback_raw}",
            "environment_feedback_only_without_solution": True,
        },
    ),
    "grpo on chosen prompts and completions": (
        "rl",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 4,
            "num_generations": 3,
            "num_trained_generations": 2,
            "max_completion_length": 2,
            "dynamic_sampling_rounds": 1,
            "replay_buffer_size": 2,
            "curriculum": "weighted",
            "pass_reward": 2.0,
        },
    ),
    "grpo held to a form": (
        "rl",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 3,
            "num_generations": 3,
            "max_completion_length": 4,
            "steps_per_generation": 2,
            "structured": {"regex": "[a-d]{1,3}(e|fg)?"},
            "importance_sampling_mode": "token_truncate",
            "replay_buffer_size": 2,
        },
    ),
    "a policy whose entropy is followed": (
        "rl",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 6,
            "num_generations": 3,
            "max_completion_length": 4,
            "num_iterations": 2,
            "loss_type": "gspo",
            "advantage_estimator": "rloo",
            "beta": 0.1,
            "kl_placement": "reward",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.01,
            "entropy_target": 1.5,
            "top_entropy_quantile": 0.8,
            "importance_sampling_mode": "geometric_truncate",
        },
    ),
    "ppo": (
        "ppo",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "max_completion_length": 4,
            "kl_target": 0.01,
            "kl_horizon": 20,
            "value_learning_rate": 1e-2,
            "eval_steps": 3,
        },
    ),
    "ppo with a value model": (
        "ppo",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "num_ppo_epochs": 2,
            "max_completion_length": 4,
            "value_learning_rate": 1e-2,
            "save_value_model": True,
        },
    ),
    "online dpo with a reference that follows": (
        "online_dpo",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "num_generations": 3,
            "max_completion_length": 4,
            "dynamic_sampling_rounds": 1,
            "sync_ref_model": True,
            "ref_model_sync_steps": 3,
            "eval_steps": 1,
            "eval_temperature": 1.0,
            "eval_num_generations": 2,
        },
    ),
    "xpo": (
        "online_dpo",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "max_completion_length": 4,
            "xpo_alpha": [0.1, 0.05, 0.0],
        },
    ),
    "nash-md with adapters": (
        "nash_md",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "max_completion_length": 4,
            "mixture_coef": [0.0, 0.5, 0.3],
            "lora_r": 2,
            "eval_steps": 2,
            "keep": "best",
            "weight_averaging": {"kind": "bema", "update_freq": 2, "update_after": 2},
        },
    ),
    "a*-po": (
        "a2po",
        "prompt_completion",
        {
            "rewards": ["tests.stages.small_models:letters"],
            "train_batch_size": 2,
            "max_completion_length": 4,
            "beta2": 0.1,
            "eval_steps": 2,
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_inputs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("case", CASES)
def test_training(tmp_path: Path, made: dict[str, Path], case: str) -> None:
    interrupt_thrice(tmp_path, made, CASES[case])


def test_killed_while_held_out_prompts_are_measured(tmp_path: Path, made: dict[str, Path]) -> None:
    """At the first measurement after steps, with no state saved, and at the next one; completions are there by then,
    and rewards of the one before are cached. Not to measure at all gives the same weights."""
    settings = {"rewards": [{"name": "tests.stages.small_models:letters", "cache": True}], "keep": "last"}
    whole = run(context_of(CASES["grpo"], tmp_path / "whole", made, settings))
    with killed_in(RewardSet, "score", calls=3):
        run(context_of(CASES["grpo"], tmp_path / "killed", made, settings))
    again = context_of(CASES["grpo"], tmp_path / "killed", made, settings)
    with killed_in(RewardSet, "score", calls=5):
        run(again)
    assert again.resumed_from is None
    last = run(context_of(CASES["grpo"], tmp_path / "killed", made, settings))
    assert last.resumed_from == 2
    for name in ("model", "rollouts"):
        assert_same(last, whole, name)
    alone = run(context_of(CASES["grpo"], tmp_path / "alone", made, settings | {"eval_steps": None}))
    assert alone.metrics.get("eval/reward") is None
    weights = [output(context, "model") / "model.safetensors" for context in (last, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
