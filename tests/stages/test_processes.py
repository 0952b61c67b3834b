"""Two processes over gloo give the steps of one process."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.training.policy_known import Known
from tests.in_process import failures, run_here
from tests.tiny_recipe import BASE, metrics_of, write_recipe
from tests.two_ranks import two_ranks
from tests.warm import Warm

TRAINING = {"learning_rate": 1e-2, "max_steps": 4, "train_batch_size": 8, "max_length": 64}
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "rows", {"weight_averaging": {"kind": "ema", "decay": 0.5}}),
    # a loss over all pairs of a step, against a reference that follows: both measured by all processes together
    "aot": (
        "preference",
        "pairs",
        {
            "loss_type": "aot",
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "ref_model_follows": "average",
            "weight_averaging": {"kind": "bema", "update_freq": 2},
            "learning_rate": 1e-3,
        },
    ),
    "kto": ("unpaired_preference", "pairs", {"loss_type": "kto", "learning_rate": 1e-3}),
    # completions of the policy and of its mixture with the reference, sampled by all processes together
    "nash_md": (
        "nash_md",
        "rows",
        {
            "rewards": [{"name": "repetition_penalty", "parameters": {"ngram_size": 1}}],
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "mixture_coef": 0.4,
            "eval_max_prompts": 5,
            "eval_steps": 2,
            "weight_averaging": {"kind": "bema", "update_freq": 1, "update_after": 1},
        },
    ),
    # by a teacher that follows the policy, of completions that all processes have sampled together
    "self_taught": (
        "sdpo",
        "rows",
        {
            "rewards": [{"name": "repetition_penalty", "parameters": {"ngram_size": 1}}],
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "distillation_weight": 0.6,
            "distillation_mode": "full_logits",
            "success_reward_threshold": 0.0,
            "reprompt_template": "{prompt}{solution}",
            "solution_template": "{successful_previous_attempt}",
        },
    ),
    "distilled": ("distill", "rows", {"lmbda": 0.0}),
    "by_sampling": ("distill", "rows", {"loss_type": "minillm", "max_completion_length": 6, "learning_rate": 1e-4}),
    "crossed": (
        "distill",
        "rows",
        {"lmbda": 0.5, "max_completion_length": 6, "cross_tokenizer": {"loss_type": "hybrid"}, "learning_rate": 1e-4},
    ),
    # of every third row the teacher is the student's start
    "several": ("distill", "thirds", {"lmbda": 0.5, "max_completion_length": 6, "teacher_column": "third"}),
}
HELD_OUT = ("sft", "aot", "kto")
MORE_INPUTS = {name: {"eval_dataset": STAGES[name][1]} for name in (*HELD_OUT, "nash_md")} | {
    "distilled": {"teacher_states": "taught"},
    "by_sampling": {"teacher": "sft"},
    "crossed": {"teacher": "bytes"},
    "several": {"teacher": ["sft", "base"]},
}
THIRDS = {"thirds": {"uses": "normalize", "with": {"source": {"path": "thirds.jsonl"}, "type": "prompt_completion"}}}


BYTES = {"bytes": {**BASE["base"], "with": {**BASE["base"]["with"], "tokenizer": "byte_bpe", "vocab_size": 270}}}


def other_signs() -> None:
    """What another library may find: singular vectors are such with either sign."""
    svd = torch.linalg.svd

    def turned(*given: Any, **more: Any) -> Any:
        left, values, right = svd(*given, **more)
        return -left, values, -right

    torch.linalg.svd = turned  # type: ignore[assignment]


@pytest.mark.slow
def test_processors_that_find_other_factors(tmp_path: Path, warm_process: Warm) -> None:
    """Both ranks start with those of the first, so their gradients add up to those of one process."""
    found = []
    for processes in (1, 2):
        start = {"lora_r": 2, "init_lora_weights": "pissa"}
        sft = {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}, "with": TRAINING | start}
        recipe = write_recipe(tmp_path / "recipe", {"sft": {**sft, "launch": {"processes": processes}}})
        unlike = two_ranks(tmp_path / "ranks", warm_process, f"{__name__}:other_signs")
        with unlike if processes > 1 else contextlib.nullcontext() as ranks:
            payload = run_here(recipe, tmp_path / str(processes), ranks=ranks)
        assert payload["state"] == "ok", failures(payload)
        found.append(metrics_of(tmp_path / str(processes), payload["stages"]["sft"]))
    for one, other in zip(*found, strict=True):
        assert (other["loss"], other["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-4)


def other_sampler() -> None:
    """One whose weights are not those of the trainer."""
    plain = Known.of

    def known(*given: Any, **more: Any) -> Known:
        found = plain(*given, **more)
        return found if found.sampled_N is None else replace(found, sampled_N=found.sampled_N + 0.5)

    Known.of = known  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_a_sampler_of_the_second_process_that_disagrees(tmp_path: Path, warm_process: Warm) -> None:
    """The first says it too, and leaves nothing."""
    _, _, settings = STAGES["self_taught"]
    settings = {name: settings[name] for name in ("rewards", "num_generations", "max_completion_length")}
    stage = {"uses": "rl", "inputs": {"model": "base", "dataset": "rows"}, "with": {**TRAINING, **settings}}
    stage = {**stage, "with": {**stage["with"], "max_steps": 1}, "launch": {"processes": 2}}
    stage["with"].pop("max_length")
    recipe = write_recipe(tmp_path / "recipe", {"learned": stage})
    with two_ranks(tmp_path / "ranks", warm_process, f"{__name__}:other_sampler") as ranks:
        payload = run_here(recipe, tmp_path / "store", ranks=ranks)
        answers = [(tmp_path / "ranks" / f"0.{rank}").read_text() for rank in range(2)]
    assert "other weights, or computes differently" in failures(payload)["learned"]
    assert "0" not in answers


def taught(budget: int, processes: int) -> dict[str, Any]:
    """What `sft` knows of the rows, in pieces that the processes share."""
    settings = {"max_length": 64, "micro_batch_tokens": budget, "shard_rows": 5}
    inputs = {"model": "sft", "dataset": "rows"}
    return {"uses": "teacher_states", "inputs": inputs, "with": settings, "launch": {"processes": processes}}


def rewarded(rows: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Step -> what is measured of completions of prompts, which the processes share out."""
    found = {int(row["step"]): {name: row[name] for name in row if name.startswith("eval/")} for row in rows}
    return {step: row for step, row in found.items() if row}


@pytest.mark.slow
def test_two_processes_and_other_micro_batches_equal_one(tmp_path: Path, warm_process: Warm) -> None:
    """Only operational settings differ, so each variant starts from a copy of one prepared store."""
    (tmp_path / "recipe").mkdir()
    thirds = [{"prompt": f"{row}+1=", "completion": str(row + 1), "third": int(row % 3 == 0)} for row in range(50)]
    (tmp_path / "recipe" / "thirds.jsonl").write_text("\n".join(map(json.dumps, thirds)))
    run_here(write_recipe(tmp_path / "recipe", BYTES | THIRDS), tmp_path / "prepared")
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, processes, budget in (("8x1", 1, 4096), ("1x8", 1, 1), ("two processes", 2, 16)):
        stages = {
            stage: {
                "uses": uses,
                "inputs": {"model": "base", "dataset": dataset, **MORE_INPUTS.get(stage, {})},
                "with": {**TRAINING, **settings, "micro_batch_tokens": budget},
                "launch": {"processes": processes},
            }
            for stage, (uses, dataset, settings) in STAGES.items()
        } | {"taught": taught(budget, processes), **BYTES, **THIRDS}
        store = tmp_path / name
        shutil.copytree(tmp_path / "prepared", store)
        with two_ranks(tmp_path / "ranks", warm_process) if processes > 1 else contextlib.nullcontext() as ranks:
            payload = run_here(write_recipe(tmp_path / "recipe", stages), store, ranks=ranks)
        assert payload["state"] == "ok", failures(payload)
        entries = payload["stages"]
        assert entries["base"]["state"] == "cached"
        found[name] = {stage: metrics_of(store, entries[stage]) for stage in STAGES}
    for stage in STAGES:
        expected = found["8x1"][stage]
        for name in ("1x8", "two processes"):
            steps = [[row for row in rows if row["step"]] for rows in (expected, found[name][stage])]
            assert len(steps[0]) == 4
            for one, other in zip(*steps, strict=True):
                assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), (stage, name)
                assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), (stage, name)
                assert other["num_tokens"] == one["num_tokens"]
                if stage in HELD_OUT:
                    assert other["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-5), name
    expected = rewarded(found["8x1"]["nash_md"])
    assert list(expected) == [0, 2, 4] and all("eval/reward" in row for row in expected.values())
    for name in ("1x8", "two processes"):
        for step, row in rewarded(found[name]["nash_md"]).items():
            assert row == pytest.approx(expected[step], rel=1e-5), name
