"""Self-distillation with privileged context, whole stages: against transformers' logits, and what must be zero."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError
from tests.data.characters import ids
from tests.data.type_losses import of_privileged
from tests.stages.small_models import output, read_lines, record_samples, run_stage, save_dataset, save_model

ROWS = [
    {"prompt": "abc", "privileged_context": "de"},
    {"prompt": "da", "privileged_context": "bbcaaa"},
    {"prompt": "hgf", "privileged_context": "e"},
]
SETTINGS: dict[str, Any] = {
    "train_batch_size": 3,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "max_completion_length": 5,
    "teacher_prompt_template": "{prompt} {privileged_context}",
}
KNOWN = {tuple(ids(row["prompt"])): (row["prompt"], f"{row['prompt']} {row['privileged_context']}") for row in ROWS}
"""A prompt's token ids -> its text, and what the teacher sees."""


def metrics(folder: Path, inputs: dict[str, Path], **settings: Any) -> list[dict[str, float]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    context = run_stage("distill", folder, inputs, **{**SETTINGS, **settings})
    return read_lines(output(context, "model") / "metrics.jsonl")


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 0.7), (0.4, 1.3)])
@pytest.mark.parametrize("teacher", [None, "other"])
def test_the_first_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float, temperature: float, teacher: str | None
) -> None:
    """The teacher is the model itself, or another one that sees the context as well."""
    student = fixed = save_model(tmp_path / "model", seed=1)
    inputs = {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "privileged_context", ROWS)}
    if teacher is not None:
        fixed = save_model(tmp_path / teacher, seed=2)
        inputs["teacher"] = tmp_path / teacher
    sampled = record_samples(monkeypatch)
    rows = metrics(tmp_path / "run", inputs, beta=beta, temperature=temperature)
    first = [(*KNOWN[tuple(prompt)], completion) for prompt, completion in sampled[:3]]
    expected = of_privileged(student, fixed, first, beta=beta, temperature=temperature)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["divergence"] == pytest.approx(expected, rel=1e-5)
    # cut into other micro-batches, the steps are the same
    cut = metrics(tmp_path / "cut", inputs, beta=beta, temperature=temperature, micro_batch_tokens=4)
    for row, other in zip(rows, cut, strict=True):
        assert (other["loss"], other["grad_norm"]) == pytest.approx((row["loss"], row["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("rate", [None, 0.25, 1.0])
def test_the_teacher_of_the_second_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float | None) -> None:
    """The model as it came; or moved towards the model after the first step, by hand, and not before the first."""
    start = save_model(tmp_path / "model", seed=1)
    inputs = {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "privileged_context", ROWS)}
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "teacher_update_rate": rate}
    (only,) = metrics(tmp_path / "one", inputs, max_steps=1, **settings)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "job" / "out" / "model")
    sampled = record_samples(monkeypatch)
    first, second = metrics(tmp_path / "two", inputs, **settings)
    assert first["loss"] == only["loss"]
    teacher = deepcopy(start)
    with torch.no_grad():
        for weight, moved in zip(teacher.parameters(), after.parameters(), strict=True):
            weight.copy_((1 - (rate or 0)) * weight + (rate or 0) * moved)
    expected = of_privileged(
        after, teacher, [(*KNOWN[tuple(prompt)], completion) for prompt, completion in sampled[3:6]]
    )
    assert second["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_that_sees_no_more_has_nothing_to_teach(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1)
    rows = [{**row, "privileged_context": ""} for row in ROWS]
    inputs = {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "privileged_context", rows)}
    settings = {"teacher_prompt_template": "{prompt}{privileged_context}", "weight_decay": 0.0}
    for beta in (0.0, 0.5, 1.0):
        first = metrics(tmp_path / str(beta), inputs, beta=beta, **settings)[0]
        assert (first["loss"], first["grad_norm"]) == (0.0, 0.0)


def test_without_a_teacher_the_rows_must_have_a_context(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1)
    inputs = {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "prompt", [{"prompt": "ab"}])}
    with pytest.raises(StageError, match=r"no input teacher, and the dataset is of type prompt: .* wire a teacher"):
        metrics(tmp_path / "run", inputs)
