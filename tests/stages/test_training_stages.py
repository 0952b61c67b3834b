"""Whole training stages in this process, on a tiny base model: what comes out against independent computations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from artifacts.errors import StageError
from stages.context import local_context
from stages.data.dataset import read_dataset
from tests.in_process import run_here
from tests.tiny_recipe import BASE, artifact_folder, write_recipe

TRAINING: dict[str, Any] = {"learning_rate": 1e-2, "train_batch_size": 8, "max_steps": 4, "max_length": 48}
Inputs = dict[str, Path]
RunStage = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """`rows`, `pairs` and `base` as folders."""
    folder = tmp_path_factory.mktemp("made")
    entries = run_here(write_recipe(folder / "recipe", {}), folder / "store")["stages"]
    found = {
        name: artifact_folder(folder / "store", next(iter(entries[name]["outputs"].values()))["id"]) for name in BASE
    }
    return {**found, "task": folder / "recipe" / "task.py"}


@pytest.fixture
def run_stage(tmp_path: Path) -> RunStage:
    """Runs a stage here and gives the folder of an output."""

    def run(stage: str, inputs: Inputs, output: str = "model", name: str = "run", **config: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)  # a stage has a process of its own
        context = local_context(stage, config, folder=tmp_path / name, inputs=inputs)
        context.stage.run(context)
        return tmp_path / name / "job" / "out" / output

    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 14)[None]).logits


def test_sft_output_is_a_plain_transformers_model(made: Inputs, run_stage: RunStage) -> None:
    folder = run_stage("sft", {"model": made["base"], "dataset": made["rows"]}, **TRAINING)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"} <= rows[0].keys()
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # the rows that steps.jsonl says were trained are the loss's rows: the first step again, by transformers alone
    step = json.loads((folder / "steps.jsonl").read_text().splitlines()[0])
    base, dataset = AutoModelForCausalLM.from_pretrained(made["base"]), read_dataset(made["rows"])
    by_id = {row["row_id"]: row for row in dataset.rows}
    total = count = 0.0
    for row in (by_id[row_id] for row_id in step["rows"]):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = base(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(prompt) + t - 1, token]) for t, token in enumerate(answer))
        count += len(answer)
    assert rows[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def merged_by_hand(base: dict[str, Any], adapter: dict[str, Any], name: str, scale: float, dora: bool) -> torch.Tensor:
    """W + scale B A, and with DoRA each row of it brought to the length that was learnt."""
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    weight: torch.Tensor = base[name] + scale * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
    if dora:
        weight = weight / weight.norm(dim=1, keepdim=True) * adapter[f"{prefix}.lora_magnitude_vector"][:, None]
    return weight


@pytest.mark.parametrize(
    ("variant", "scale"),
    # alpha / r, and alpha / sqrt(r)
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"use_dora": True}, 2.0), ({"use_rslora": True, "use_dora": True}, 4.0)],
)
def test_adapters_by_their_formulas(made: Inputs, run_stage: RunStage, variant: dict[str, bool], scale: float) -> None:
    settings = {**TRAINING, "lora_r": 4, "lora_alpha": 8, **variant}
    folder = run_stage("sft", {"model": made["base"], "dataset": made["rows"]}, **settings)
    base, merged = load_file(made["base"] / "model.safetensors"), load_file(folder / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    adapted = [name for name in base if "_proj" in name]
    assert len(adapted) == 14
    for name in adapted:
        expected = merged_by_hand(base, adapter, name, scale, variant.get("use_dora", False))
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-4)
        assert not torch.equal(merged[name], base[name])


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_merges_what_its_adapter_says(made: Inputs, run_stage: RunStage, bf16: bool) -> None:
    """In bfloat16 too, what no adapter touches leaves with the bits it came with."""
    from peft import PeftModel

    settings = {**TRAINING, "lora_r": 4, "lora_alpha": 8, "bf16": bf16}
    folder = run_stage("sft", {"model": made["base"], "dataset": made["rows"]}, **settings)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made["base"]), folder / "adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    base = load_file(made["base"] / "model.safetensors")
    changed = {name for name, tensor in load_file(folder / "model.safetensors").items() if not tensor.equal(base[name])}
    assert changed
    assert all("_proj" in name for name in changed)


def test_reference_in_memory_equals_the_precomputed_one(made: Inputs, run_stage: RunStage) -> None:
    """The same bits, and at the first step every implicit reward is exactly zero, so the loss is log 2."""
    inputs = {"model": made["base"], "dataset": made["pairs"]}
    precomputed = run_stage("reference_logprobs", inputs, "logprobs", "reference", max_length=48)
    settings = {**TRAINING, "learning_rate": 1e-3, "max_steps": 8}
    with_artifact = run_stage("preference", {**inputs, "reference_logprobs": precomputed}, name="a", **settings)
    in_memory = run_stage("preference", inputs, name="b", **settings)
    assert (with_artifact / "model.safetensors").read_bytes() == (in_memory / "model.safetensors").read_bytes()
    assert metrics(with_artifact) == metrics(in_memory)
    first, last = metrics(in_memory)[0], metrics(in_memory)[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < first["loss"]


def test_references_of_other_rows_are_refused(made: Inputs, run_stage: RunStage) -> None:
    inputs = {"model": made["base"], "dataset": made["pairs"]}
    cut = run_stage("reference_logprobs", inputs, "logprobs", "reference", max_length=6)
    with pytest.raises(
        StageError,
        match=r"input reference_logprobs(: row [^ ]+: log-probabilities are of| has no log-probability of row)",
    ):
        run_stage("preference", {**inputs, "reference_logprobs": cut}, name="a", **TRAINING)


def test_reward_model_is_a_plain_classifier_that_learns(made: Inputs, run_stage: RunStage) -> None:
    inputs = {"model": made["base"], "dataset": made["pairs"]}
    settings = {**TRAINING, "max_steps": 60, "train_batch_size": 32, "learning_rate": 3e-3}
    folder = run_stage("reward_model", inputs, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    rows = metrics(folder)
    assert rows[0]["loss"] == pytest.approx(0.693, abs=0.2)
    assert rows[-1]["accuracy"] > 0.8


def test_rollouts_hold_what_was_sampled_and_why(made: Inputs, run_stage: RunStage, tmp_path: Path) -> None:
    """Log-probabilities against teacher forcing by transformers, rewards and advantages by hand."""
    settings = {**TRAINING, "train_batch_size": 12, "num_generations": 4, "max_completion_length": 5, "max_steps": 2}
    rewards = {"rewards": [f"{made['task']}:length"]}
    folder = run_stage("rl", {"model": made["base"], "dataset": made["rows"]}, "rollouts", **settings, **rewards)
    rows = list(read_dataset(folder).rows)
    assert len(rows) == 24
    base = AutoModelForCausalLM.from_pretrained(made["base"])
    tokenizer = AutoTokenizer.from_pretrained(made["base"])
    first = [row for row in rows if row["step"] == 1]
    for row in first:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = base(input_ids=torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(-1)
        forced = [float(logprobs[len(prompt) + t - 1, token]) for t, token in enumerate(row["token_ids"])]
        assert row["logprobs"] == pytest.approx(forced, abs=1e-4)
        assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["reward"] == len(row["completion"]) / 4
    for start in range(0, 12, 4):
        group = torch.tensor([row["reward"] for row in first[start : start + 4]], dtype=torch.float64)
        expected = (group - group.mean()) / (group.std() + 1e-4)
        found = [row["advantage"] for row in first[start : start + 4]]
        assert found == pytest.approx(expected.tolist(), abs=1e-6)
    trained = tmp_path / "run" / "job" / "out" / "model"
    assert metrics(trained)[0]["reward"] == pytest.approx(sum(row["reward"] for row in first) / 12)
    assert metrics(trained)[0]["sampling/sampling_logp_difference/mean"] < 1e-4


def test_grpo_raises_its_reward(made: Inputs, run_stage: RunStage) -> None:
    settings = {
        **TRAINING,
        "learning_rate": 3e-3,
        "train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": 6,
        "max_steps": 15,
        "rewards": [f"{made['task']}:length"],
    }
    rows = metrics(run_stage("rl", {"model": made["base"], "dataset": made["rows"]}, **settings))
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.2


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(made: Inputs, run_stage: RunStage) -> None:
    inputs = {"model": made["base"], "teacher": made["base"], "dataset": made["rows"]}
    for name, beta in (("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)):
        settings = {**TRAINING, "beta": beta, "lmbda": 0.5, "max_completion_length": 4}
        rows = metrics(run_stage("distill", inputs, name=name, **settings))
        assert rows[0]["loss"] == pytest.approx(0, abs=1e-5)
        assert rows[0]["grad_norm"] == pytest.approx(0, abs=1e-3)


def test_bf16_stays_near_fp32(made: Inputs, run_stage: RunStage) -> None:
    inputs = {"model": made["base"], "dataset": made["rows"]}
    exact = metrics(run_stage("sft", inputs, name="fp32", **TRAINING))
    rounded = metrics(run_stage("sft", inputs, name="bf16", bf16=True, **TRAINING))
    assert rounded != exact
    for left, right in zip(exact, rounded, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02)


def test_gradient_checkpointing_changes_nothing(made: Inputs, run_stage: RunStage) -> None:
    inputs = {"model": made["base"], "dataset": made["rows"]}
    plain = run_stage("sft", inputs, name="plain", **TRAINING)
    saving = run_stage("sft", inputs, name="saving", gradient_checkpointing=True, **TRAINING)
    for left, right in zip(metrics(plain), metrics(saving), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_trackers_get_the_metrics(made: Inputs, run_stage: RunStage, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_stage("sft", {"model": made["base"], "dataset": made["rows"]}, report_to=["tensorboard"], **TRAINING)
    (logged,) = (tmp_path / "run" / "job" / "trackers").iterdir()
    read = EventAccumulator(str(logged))
    read.Reload()
    assert [entry.value for entry in read.Scalars("sft/loss")] == pytest.approx(
        [row["loss"] for row in metrics(folder)]
    )
