"""Every stage that trains on given rows, interrupted and run again: the bytes of the artifact that was never
interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.training.loop import Trainer
from tests.stages import test_resume_online
from tests.stages.interruptions import Killed, assert_same, kill_after, killed_in, process_killed_in_step
from tests.stages.resuming import PAIRS, Case, context_of, interrupt_thrice, run, save_inputs
from tests.warm import Warm

CASES: dict[str, Case] = {
    "sft with noise and packing": (
        "sft",
        "prompt_completion",
        {"neftune_noise_alpha": 5.0, "packing": True, "max_length": 12, "train_batch_size": 2},
    ),
    "dft of weighted rows with adapters and dropout": (
        "sft",
        "prompt_completion",
        {
            "loss_type": "dft",
            "weight_column": "w",
            "lora_r": 2,
            "lora_dropout": 0.2,
            "eval_steps": 1,
            "keep": "best",
            "weight_averaging": {"kind": "ema", "decay": 0.6},
        },
    ),
    "dpo": (
        "preference",
        PAIRS,
        {"loss_type": ["sigmoid", "sft"], "label_smoothing": 0.1, "shard_rows": 1, "eval_steps": 2, "keep": "best"},
    ),
    "a reference that follows": (
        "preference",
        PAIRS,
        {"sync_ref_model": True, "ref_model_sync_steps": 3, "eval_steps": 2, "keep": "best"},
    ),
    "a moving average of the reference": (
        "preference",
        PAIRS,
        {
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "ref_model_mixup_alpha": 0.1,
            "ref_model_follows": "average",
            "weight_averaging": {"kind": "bema", "update_freq": 3, "update_after": 1},
            "ld_alpha": 0.5,
        },
    ),
    "pairs of a step against each other": ("preference", PAIRS, {"loss_type": "aot_unpaired"}),
    "weighted pairs under another divergence": (
        "preference",
        PAIRS,
        {"use_weighting": True, "f_divergence_type": "js_divergence", "ld_alpha": 0.3},
    ),
    "triple preferences": ("preference", PAIRS, {"loss_type": "tpo_l"}),
    "kto": (
        "unpaired_preference",
        "unpaired_preference",
        {"loss_type": "kto", "undesirable_weight": 1.5, "shard_rows": 1, "eval_steps": 2},
    ),
    "bco": ("unpaired_preference", "unpaired_preference", {"loss_type": "bco", "use_density_ratio": True}),
    "reward model": ("reward_model", PAIRS, {"center_rewards_coefficient": 0.1, "eval_steps": 2}),
    "process reward model": ("process_reward_model", "stepwise_supervision", {"step_separator": "h"}),
    "self-distillation": ("distill", "privileged_context", {"beta": 0.4, "max_completion_length": 4}),
    "self-distillation by policy gradients": (
        "distill",
        "privileged_context",
        {"loss_type": "minillm", "gamma": 0.9, "max_completion_length": 4},
    ),
    "self-distillation from a teacher that follows": (
        "distill",
        "privileged_context",
        {"max_completion_length": 4, "teacher_update_rate": 0.3, "teacher_sync_steps": 3, "eval_steps": 2},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_inputs(tmp_path_factory.mktemp("made"))


def test_every_stage_is_here() -> None:
    """Those that train; what else there is: test_resume_passes."""
    from stages.stage import STAGES, load_stage
    from stages.training.config import TrainingConfig

    training = {name for name in STAGES if issubclass(load_stage(name).config, TrainingConfig)}
    assert {stage for stage, _, _ in (*CASES.values(), *test_resume_online.CASES.values())} == training


@pytest.mark.parametrize("case", CASES)
def test_training(tmp_path: Path, made: dict[str, Path], case: str) -> None:
    interrupt_thrice(tmp_path, made, CASES[case])


@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_a_stage_that_computes_its_reference(tmp_path: Path, made: dict[str, Path], case: str) -> None:
    """Killed after two shards of the reference, and after a step."""
    whole = run(context_of(CASES[case], tmp_path / "whole", made))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(context_of(CASES[case], tmp_path / "killed", made))
    with killed_in(Trainer, "step", calls=2):
        run(context_of(CASES[case], tmp_path / "killed", made))
    assert_same(run(context_of(CASES[case], tmp_path / "killed", made)), whole)


def test_a_process_that_is_really_killed(tmp_path: Path, made: dict[str, Path], warm_process: Warm) -> None:
    """SIGKILL in a step of BCO, whose running reward shift must come from the state; its last save may be torn."""
    whole = run(context_of(CASES["bco"], tmp_path / "whole", made))
    killed = context_of(CASES["bco"], tmp_path / "killed", made)
    process_killed_in_step(killed, 5, tmp_path / "spec.json", warm_process, saved=False)
    last = run(context_of(CASES["bco"], tmp_path / "killed", made))
    assert last.resumed_from in (2, 4)
    assert_same(last, whole)
