"""Every dataset type from a file to the loss of its first step, which plain transformers must give as well.

The rows go through `normalize` and then train in the stage that takes their type, on tiny models whose pad token is
their end token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState

from stages.data.dataset import read_dataset
from tests.data.characters import build_tokenizer, ids
from tests.data.type_cases import CASES, CONTEXT_TEMPLATE, PRIVILEGED, PROMPTS, TEMPLATE
from tests.data.type_losses import SEED, Models, of_privileged
from tests.stages.normalized import Normalized
from tests.stages.small_models import output, read_lines, record_samples, run_stage, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    policy, fixed = save_model(folder / "model", seed=1), save_model(folder / "reference", seed=2)
    for name in ("model", "reference"):
        build_tokenizer(template=TEMPLATE).save_pretrained(folder / name)
    return Models(folder / "model", folder / "reference", policy, fixed)


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def normalized(folder: Path, rows: list[dict[str, Any]], kind: str, file_type: str) -> Path:
    folder.mkdir()
    path = folder / f"rows.{file_type}"
    if file_type == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Normalized(folder, path, type=kind)
    return folder / "job" / "out" / "train"


@pytest.mark.parametrize("name", CASES)
def test_the_first_loss_is_that_of_transformers(tmp_path: Path, models: Models, name: str) -> None:
    case = CASES[name]
    dataset = normalized(tmp_path / "rows", case.rows, case.given_type, "jsonl")
    assert read_dataset(dataset).type == case.type
    # the same shape in Parquet gives the same typed rows
    columnar = normalized(tmp_path / "columns", case.rows, case.given_type, "parquet")
    without_ids = [[{**row, "row_id": ""} for row in read_dataset(folder)] for folder in (dataset, columnar)]
    assert without_ids[0] == without_ids[1]
    inputs = {"model": models.model, "dataset": dataset} | ({"reference": models.reference} if case.reference else {})
    batch = {"train_batch_size": len(case.seen), "num_train_epochs": 2}
    settings = {"learning_rate": 1e-3, "seed": SEED, **batch, **case.settings}
    context = run_stage(case.stage, tmp_path / "run", inputs, **settings)
    first, second = read_lines(output(context, "model") / "metrics.jsonl")
    assert first["loss"] == pytest.approx(case.loss(models, case.seen), rel=1e-5)
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_answered_from_where_the_model_goes_on(tmp_path: Path, models: Models, name: str) -> None:
    """What was sampled has the probability that transformers gives it behind the prompt; the loss is its advantage."""
    rows, seen = PROMPTS[name]
    (tmp_path / "reward.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(str(one))) for one in completions]\n"
    )
    dataset = normalized(tmp_path / "rows", rows, "auto", "jsonl")
    assert read_dataset(dataset).type == "prompt"
    settings = {"train_batch_size": 8, "num_generations": 4, "max_completion_length": 3, "max_steps": 2}
    rewards = {"rewards": [f"{tmp_path / 'reward.py'}:length"], "learning_rate": 1e-3}
    context = run_stage("rl", tmp_path / "run", {"model": models.model, "dataset": dataset}, **settings, **rewards)
    first = [row for row in read_dataset(output(context, "rollouts")) if row["step"] == 1]
    prompts = dict(zip((json.dumps(row["prompt"]) for row in rows), map(ids, seen), strict=True))
    for row in first:
        prompt = prompts[json.dumps(row["prompt"])]
        with torch.no_grad():
            logits = models.policy(input_ids=torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(-1)
        forced = [float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(row["token_ids"])]
        assert row["logprobs"] == pytest.approx(forced, abs=1e-4)
    lengths = [len(row["token_ids"]) for row in first]
    weighed = sum(row["advantage"] * length for row, length in zip(first, lengths, strict=True))
    loss = read_lines(output(context, "model") / "metrics.jsonl")[0]["loss"]
    assert loss == pytest.approx(-weighed / sum(lengths), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_privileged_context_is_seen_by_the_teacher_alone(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Completions of the prompt alone, and their divergence from the same model behind prompt and context."""
    rows, seen = PRIVILEGED[name]
    dataset = normalized(tmp_path / "rows", rows, "auto", "jsonl")
    columnar = normalized(tmp_path / "columns", rows, "auto", "parquet")
    without_ids = [[{**row, "row_id": ""} for row in read_dataset(folder)] for folder in (dataset, columnar)]
    assert read_dataset(dataset).type == "privileged_context" and without_ids[0] == without_ids[1]
    settings = {"train_batch_size": 2, "max_completion_length": 3, "max_steps": 2, "learning_rate": 1e-3}
    sampled = record_samples(monkeypatch)
    inputs = {"model": models.model, "dataset": dataset}
    context = run_stage("distill", tmp_path / "run", inputs, teacher_prompt_template=CONTEXT_TEMPLATE, **settings)
    texts = {tuple(ids(prompt)): (prompt, shown) for prompt, shown in seen}
    first = [(*texts[tuple(prompt)], completion) for prompt, completion in sampled[:2]]
    assert {prompt for prompt, _, _ in first} == {prompt for prompt, _ in seen}
    loss = read_lines(output(context, "model") / "metrics.jsonl")[0]["loss"]
    assert loss == pytest.approx(of_privileged(models.policy, models.policy, first), rel=1e-5)
