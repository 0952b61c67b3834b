"""Every stage of offline training, interrupted and run again: the bytes of the artifact that was never interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as parquet
import pytest
from accelerate.state import AcceleratorState

from stages import averaging
from stages.context import Context, local_context
from stages.rollouts.rewards import RewardSet
from stages.training import export as exporting
from stages.training.checkpoint import Progress, Saver
from stages.training.loop import Trainer
from tests.stages.small_models import Killed, kill_after, output, read_lines, save_dataset, save_model

ROOT = Path(__file__).parents[2]
STEPS = 6
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "train_batch_size": 3, "max_steps": STEPS, "checkpoint_steps": 2}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt_completion": [
        {"prompt": "abc", "completion": "de", "w": 1.0},
        {"prompt": "da", "completion": "bbcaaa", "w": 3.0},
        {"prompt": "hgf", "completion": "e", "w": 0.5},
        {"prompt": "cab", "completion": "aabbcc", "w": 2.0},
    ],
    "triple_preference": [
        {"prompt": "abc", "chosen": "de", "rejected": "fghab", "reference": "aa", "margin": 0.5},
        {"prompt": "da", "chosen": "bbc", "rejected": "c", "reference": "bcd", "margin": 1.0},
        {"prompt": "hgf", "chosen": "e", "rejected": "dd", "reference": "e", "margin": 0.0},
        {"prompt": "cab", "chosen": "aabb", "rejected": "ha", "reference": "ffg", "margin": 2.0},
    ],
    "unpaired_preference": [
        {"prompt": "abc", "completion": "de", "label": True},
        {"prompt": "da", "completion": "bbc", "label": False},
        {"prompt": "hgf", "completion": "e", "label": True},
        {"prompt": "cab", "completion": "ha", "label": False},
        {"prompt": "cab", "completion": "aabb", "label": True},
    ],
    "privileged_context": [
        {"prompt": "abc", "privileged_context": "de"},
        {"prompt": "da", "privileged_context": "bbcaaa"},
        {"prompt": "hgf", "privileged_context": "e"},
        {"prompt": "cab", "privileged_context": "aabbcc"},
    ],
    "stepwise_supervision": [
        {"prompt": "abc", "completions": ["de", "f"], "labels": [True, False]},
        {"prompt": "da", "completions": ["bbc", "aa", "e"], "labels": [True, True, True]},
        {"prompt": "gf", "completions": ["e"], "labels": [False]},
        {"prompt": "cab", "completions": ["aab", "ff"], "labels": [False, False]},
    ],
}
PAIRS = "triple_preference"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: stage, rows, settings
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


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, the rows of every type, and rewarded completions of the prompts."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model", seed=1)
    save_model(folder / "value_model", seed=2, reward=True)
    rewards = {"prompt_row_id": "r0", "reward": 1.0}, {"prompt_row_id": "r1", "reward": 2.0}
    samples = [{"prompt": "", "completion": "a", **one} for one in (*rewards, {"prompt_row_id": "r3", "reward": 0.5})]
    return {
        "model": folder / "model",
        "samples": save_dataset(folder / "samples", "prompt_completion", samples),
        "value_model": folder / "value_model",
        **{kind: save_dataset(folder / kind, kind, rows) for kind, rows in ROWS.items()},
    }


def context_of(
    case: str, folder: Path, made: dict[str, Path], more: Mapping[str, Any] = MappingProxyType({})
) -> Context:
    """`more`: settings beside the case's, or in their place."""
    stage, rows, settings = CASES[case]
    settings = {**settings, **more}
    inputs: dict[str, Any] = {"model": made["model"], "dataset": made[rows]}
    if stage == "a2po":
        inputs["samples"] = made["samples"]
    if settings.get("eval_steps"):
        inputs["eval_dataset"] = made[rows]
    if "save_value_model" in settings:
        inputs["value_model"] = made["value_model"]
    AcceleratorState._reset_state(reset_partial_state=True)
    return local_context(stage, TRAINING | settings, folder=folder, inputs=inputs)


def run(context: Context) -> Context:
    context.stage.run(context)
    return context


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(context: Context, whole: Context, name: str = "model") -> None:
    found, expected = (files_of(output(one, name)) for one in (context, whole))
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


@contextmanager
def killed_in(owner: Any, name: str, *, calls: int) -> Iterator[None]:
    """The process dies in place of one of the calls."""
    original, done = getattr(owner, name), []

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        done.append(name)
        if len(done) == calls:
            raise Killed
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, deadly)
        yield


@contextmanager
def saved_states_stay() -> Iterator[None]:
    """A thread writes a state while training goes on: what was given away for saving must not change with it."""
    original, given = Saver.save, []

    def save(self: Saver, progress: Progress, waited_seconds: float) -> None:
        given.append((progress.windows, json.dumps(progress.windows)))
        original(self, progress, waited_seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save)
        yield
    assert given and all(json.dumps(state) == text for state, text in given)


def test_every_stage_is_here() -> None:
    """Those that train; the others are below."""
    from stages.stage import STAGES, load_stage
    from stages.training.config import TrainingConfig

    training = {name for name in STAGES if issubclass(load_stage(name).config, TrainingConfig)}
    assert {stage for stage, _, _ in CASES.values()} == training


@pytest.mark.parametrize("case", CASES)
def test_training(tmp_path: Path, made: dict[str, Path], case: str) -> None:
    """Killed between two states, at a state, and while the model is written."""
    with saved_states_stay():
        whole = run(context_of(case, tmp_path / "whole", made))
    with killed_in(Trainer, "step", calls=4):
        run(context_of(case, tmp_path / "killed", made))
    again = context_of(case, tmp_path / "killed", made)
    with killed_in(Trainer, "step", calls=3):
        run(again)
    assert again.resumed_from == 2
    again = context_of(case, tmp_path / "killed", made)
    with killed_in(exporting, "write_jsonl", calls=2):
        run(again)
    assert again.resumed_from == 4
    last = run(context_of(case, tmp_path / "killed", made))
    steps = [row["step"] for row in read_lines(output(last, "model") / "metrics.jsonl")]
    assert last.resumed_from == 4 and [step for step in steps if step] == list(range(1, STEPS + 1))
    for name in last.stage.outputs_of(last.config):
        assert_same(last, whole, name)


def test_killed_while_held_out_prompts_are_measured(tmp_path: Path, made: dict[str, Path]) -> None:
    """At the first measurement after steps, with no state saved, and at the next one; completions are there by then,
    and rewards of the one before are cached. Not to measure at all gives the same weights."""
    settings = {"rewards": [{"name": "tests.stages.small_models:letters", "cache": True}], "keep": "last"}
    whole = run(context_of("grpo", tmp_path / "whole", made, settings))
    with killed_in(RewardSet, "score", calls=3):
        run(context_of("grpo", tmp_path / "killed", made, settings))
    again = context_of("grpo", tmp_path / "killed", made, settings)
    with killed_in(RewardSet, "score", calls=5):
        run(again)
    assert again.resumed_from is None
    last = run(context_of("grpo", tmp_path / "killed", made, settings))
    assert last.resumed_from == 2
    for name in ("model", "rollouts"):
        assert_same(last, whole, name)
    alone = run(context_of("grpo", tmp_path / "alone", made, settings | {"eval_steps": None}))
    assert alone.metrics.get("eval/reward") is None
    weights = [output(context, "model") / "model.safetensors" for context in (last, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("rows", [PAIRS, "unpaired_preference", "prompt_completion"])
def test_reference_logprobs(tmp_path: Path, made: dict[str, Path], rows: str) -> None:
    """Killed after two shards."""

    def context(folder: Path) -> Context:
        inputs: dict[str, Any] = {"model": made["model"], "dataset": made[rows]}
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {"per_token": True, "shard_rows": 1}
        return local_context("reference_logprobs", settings, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(context(tmp_path / "killed"))
    last = run(context(tmp_path / "killed"))
    assert last.resumed_from == 2
    assert_same(last, whole, "logprobs")


@pytest.mark.parametrize("stage", ["reference_logprobs", "teacher_states"])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4), (2, 3)])
def test_rows_that_are_cut_another_way(
    tmp_path: Path, made: dict[str, Path], stage: str, before: int, after: int
) -> None:
    """`shard_rows` is no part of the result but for rounding: a piece of another cut is not taken for one of this."""

    def context(folder: Path, rows: int) -> Context:
        inputs: dict[str, Any] = {"model": made["model"], "dataset": made["prompt_completion"]}
        AcceleratorState._reset_state(reset_partial_state=True)
        return local_context(stage, {"shard_rows": rows}, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole", before))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        run(context(tmp_path / "killed", before))
    last = run(context(tmp_path / "killed", after))
    name = next(iter(last.stage.outputs))
    found, expected = (
        parquet.read_table(next(output(one, name).glob("*.parquet"))).to_pydict() for one in (last, whole)
    )
    assert last.counts == whole.counts and found.keys() == expected.keys() and len(found["row_id"]) >= after
    for column, values in expected.items():
        assert found[column] == (pytest.approx(values, rel=1e-5) if column.endswith("logps") else values)


@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_a_stage_that_computes_its_reference(tmp_path: Path, made: dict[str, Path], case: str) -> None:
    """Killed after two shards of the reference, and after a step."""
    whole = run(context_of(case, tmp_path / "whole", made))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(context_of(case, tmp_path / "killed", made))
    with killed_in(Trainer, "step", calls=2):
        run(context_of(case, tmp_path / "killed", made))
    assert_same(run(context_of(case, tmp_path / "killed", made)), whole)


def test_average(tmp_path: Path, made: dict[str, Path]) -> None:
    """Killed between weights and the rest: it begins anew, over whatever lies there."""
    save_model(tmp_path / "other", seed=2)
    inputs: dict[str, Any] = {"models": [made["model"], tmp_path / "other"]}

    def context(folder: Path) -> Context:
        return local_context("average", {"weights": [2.0, 1.0]}, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole"))
    with killed_in(averaging.shutil, "copyfile", calls=2):
        run(context(tmp_path / "killed"))
    assert_same(run(context(tmp_path / "killed")), whole)


PROGRAM = """
import os, signal, sys
import stages.__main__
from stages.training.loop import Trainer

step = Trainer.step

def deadly(self, number, total, window):
    if number == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, total, window)

Trainer.step = deadly
sys.exit(stages.__main__.main([sys.argv[1]]))
"""


def test_a_process_that_is_really_killed(tmp_path: Path, made: dict[str, Path]) -> None:
    """SIGKILL in a step of BCO, whose running reward shift must come from the state; its last save may be torn."""
    whole = run(context_of("bco", tmp_path / "whole", made))
    context = context_of("bco", tmp_path / "killed", made)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(asdict(context.spec)))
    command = [sys.executable, "-c", PROGRAM.format(number=5), str(spec)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = run(context_of("bco", tmp_path / "killed", made))
    assert last.resumed_from in (2, 4)
    assert_same(last, whole)
