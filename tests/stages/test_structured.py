"""Stages whose completions are held to a form: all that they sample is of it, and ratios stay those of one policy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from stages.rollouts.engine_settings import EngineChoice
from stages.rollouts.requests import SamplingConfig
from stages.stage import Config, load_stage
from tests.data.characters import CHARACTERS, IDS, ids
from tests.stages.online_runs import make_inputs
from tests.stages.small_models import EOS, output, read_lines, record_samples, rows_of, run_stage, save_dataset

REGEX = "[ad]{1,2}(b|gh)?"
FORM = {"structured": {"regex": REGEX}}
REWARDS = {"rewards": ["tests.stages.small_models:letters"]}
SHORT = {"max_completion_length": 6, "train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
SAMPLING: dict[str, dict[str, Any]] = {
    "sample": {"num_generations": 4, "outputs": ["completions"], "max_completion_length": 6},
    "evaluate": {**REWARDS, "threshold": 2.0, "max_completion_length": 6, "num_generations": 3, "temperature": 0.8},
    "rl": {**REWARDS, **SHORT, "num_generations": 4, "beta": 0.1},
    "ppo": {**REWARDS, **SHORT},
    "online_dpo": {**REWARDS, **SHORT, "xpo_alpha": 0.1},
    "nash_md": {**REWARDS, **SHORT},
    "sdpo": {**REWARDS, **SHORT, "num_generations": 2},
    "a2po": {**REWARDS, **SHORT},
    "distill": SHORT,
}
LETTER = {token: character for character, token in IDS.items() if character in CHARACTERS}


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    found = make_inputs(tmp_path)
    samples = [{"prompt": "", "completion": "a", "prompt_row_id": f"r{index}", "reward": 1.0} for index in range(4)]
    found["samples"] = save_dataset(tmp_path / "samples", "prompt_completion", samples)
    return found


def inputs_of(stage: str, made: dict[str, Any]) -> dict[str, Path]:
    beside = {"a2po": {"samples": made["samples"]}, "distill": {"teacher": made["folder"] / "reference"}}
    return {"model": made["folder"] / "policy", "dataset": made["rows"], **beside.get(stage, {})}


@pytest.mark.parametrize("stage", SAMPLING)
def test_every_stage_that_samples(stage: str, made: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Those that compare sampler and trainer would end the run where free log-probabilities are others."""
    samples = record_samples(monkeypatch)
    run_stage(stage, tmp_path / "run", inputs_of(stage, made), **SAMPLING[stage], **FORM)
    texts = ["".join(LETTER[token] for token in completion if token != EOS) for _, completion in samples]
    assert len(texts) > 3
    assert all(re.fullmatch(REGEX, text) for text in texts), texts


@pytest.mark.parametrize("stage", ["sample", "rl", "nash_md", "distill"])
def test_added_tokens_that_are_spelled_out_are_said_once(stage: str, made: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made["folder"] / "policy")
    form = {"structured": {"grammar": f'start: "a"\nother: "{tokenizer.eos_token}"'}}
    context = run_stage(stage, tmp_path / "run", inputs_of(stage, made), **SAMPLING[stage], **form)
    said = [event.get("text", "") for event in read_lines(Path(context.spec.job) / "events.jsonl")]
    found = [text for text in said if "of the form are written in other tokens" in text]
    assert len(found) == 1 and found[0].startswith(f"structured: {tokenizer.eos_token} of the form"), said


def test_no_stage_that_samples_is_without() -> None:
    assert {name for name in SAMPLING if "structured" in load_stage(name).config.model_fields} == SAMPLING.keys()
    assert issubclass(EngineChoice, Config) and "structured" in SamplingConfig.model_fields


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratios_are_of_the_policy_without_the_form(made: dict[str, Any], tmp_path: Path, temperature: float) -> None:
    """Trainer and sampler compare among all tokens, so a correction finds nothing to correct; what was drawn from is in
    the rollouts beside it, and is likelier by what the form left out."""
    settings = {**SAMPLING["rl"], **FORM, "temperature": temperature, "importance_sampling_mode": "token_truncate"}
    context = run_stage("rl", tmp_path / "run", inputs_of("rl", made), **settings)
    for row in read_lines(output(context, "model") / "metrics.jsonl"):
        assert row["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-4)
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    rollouts = rows_of(output(context, "rollouts"))
    for row in [row for row in rollouts if row["step"] == 1]:
        tokens = [*ids(row["prompt"]), *row["token_ids"]]
        with torch.no_grad():
            logits = made["policy"](torch.tensor([tokens])).logits[0, -len(row["token_ids"]) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(row["token_ids"])[:, None])[:, 0]
        assert row["free_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    pairs = [pair for row in rollouts for pair in zip(row["logprobs"], row["free_logprobs"], strict=True)]
    assert all(held >= free - 1e-6 for held, free in pairs)
    assert any(held > free + 1 for held, free in pairs)


@pytest.mark.parametrize("loss_type", ["iw_opd", "minillm"])
def test_a_teacher_judges_tokens_among_all(loss_type: str, made: dict[str, Any], tmp_path: Path) -> None:
    """As it does without a form: its probability against the student's own."""
    settings = {**SHORT, **FORM, "loss_type": loss_type, "importance_sampling_mode": "token_truncate"}
    context = run_stage("distill", tmp_path / "run", inputs_of("distill", made), **settings)
    for row in read_lines(output(context, "model") / "metrics.jsonl"):
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
        assert row["sampling/sampling_logp_difference/max"] < 1e-4


def test_recorded_rollouts_of_a_form_are_trained_on_as_they_were(made: dict[str, Any], tmp_path: Path) -> None:
    """By the same weights the ratio to the recorded policy is 1 again, so a step is the same step."""
    settings = {**SAMPLING["rl"], "max_steps": 1, "train_batch_size": 16, "lr_scheduler_type": "constant"}
    first = run_stage("rl", tmp_path / "first", inputs_of("rl", made), **settings, **FORM)
    recorded = {"model": made["folder"] / "policy", "rollouts": output(first, "rollouts")}
    again = run_stage("rl", tmp_path / "again", recorded, **{**settings, "rewards": []})
    one, other = (load_file(output(context, "model") / "model.safetensors") for context in (first, again))
    before = load_file(made["folder"] / "policy" / "model.safetensors")
    assert any(not torch.equal(one[name], before[name]) for name in one)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4
