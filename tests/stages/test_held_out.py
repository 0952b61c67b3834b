"""Input `eval_dataset` of the training stages: its loss by transformers itself, and that it changes nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from artifacts.errors import DataError, StageError
from stages import reward_model, sft
from stages.training.held_out import HeldOut
from tests.data.characters import ids
from tests.stages.small_models import (
    EOS,
    labels_loss,
    logged,
    output,
    read_lines,
    reward_of,
    run_stage,
    save_completions,
    save_dataset,
)

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e"), ("cab", "aabbcc")]
APART = [("ga", "abc"), ("bad", "e"), ("h", "cafe")]
PAIRS = [("ga", "abc", "e"), ("bad", "e", "hh"), ("h", "cafe", "face")]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "train_batch_size": 2, "max_steps": 5, "max_length": 16}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_completions(tmp_path_factory.mktemp("inputs"), dataset=ROWS, eval_dataset=APART)


@pytest.fixture(scope="module")
def pairs(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    given = save_dataset(folder / "dataset", "preference", rows[:1] * 2)
    return {
        "model": inputs["model"],
        "dataset": given,
        "eval_dataset": save_dataset(folder / "apart", "preference", rows),
    }


def test_the_loss_is_that_of_transformers_on_the_weights_of_the_step(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """After steps 2, 4 and the last one; of the last by the model that the stage leaves."""
    context = run_stage("sft", tmp_path, inputs, **SETTINGS, eval_steps=2)
    metrics = read_lines(output(context, "model") / "metrics.jsonl")
    assert [row["step"] for row in metrics if "eval/loss" in row] == [2, 4, 5]
    model = AutoModelForCausalLM.from_pretrained(output(context, "model")).eval()
    losses = [labels_loss(model, *row) for row in APART]
    expected = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    assert metrics[-1]["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert context.metrics["eval/loss"] == metrics[-1]["eval/loss"]
    assert metrics[1]["eval/loss"] != pytest.approx(expected, rel=1e-3)
    assert context.counts["eval_rows"] == 3 and context.timings["eval_seconds"] > 0
    said = [line for line in logged(Path(context.spec.job)) if "eval/loss" in line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 5"]


@pytest.mark.parametrize(("steps", "says"), [(4, False), (5, True), (9, True)])
def test_a_learning_rate_that_is_not_reached_is_said(
    tmp_path: Path, inputs: dict[str, Path], steps: int, says: bool
) -> None:
    context = run_stage("sft", tmp_path, inputs, **SETTINGS, warmup_steps=steps)
    said = "the learning rate rises over all 5 steps and does not reach 0.01"
    assert (said in logged(Path(context.spec.job))) == says


@pytest.mark.parametrize(
    "settings",
    [
        {"neftune_noise_alpha": 5.0},
        {"lora_r": 2, "lora_dropout": 0.5},
        {"packing": True, "packing_strategy": "wrapped", "micro_batch_tokens": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_measuring_changes_no_bit_of_what_is_trained(
    tmp_path: Path, inputs: dict[str, Path], settings: dict[str, Any]
) -> None:
    """Nor do dropout, noise and packs reach what is measured: it is the same in passes of one row."""
    plain = {name: inputs[name] for name in ("model", "dataset")}
    alone = output(run_stage("sft", tmp_path / "alone", plain, **SETTINGS, **settings), "model")
    measured = output(run_stage("sft", tmp_path / "measured", inputs, **SETTINGS, **settings, eval_steps=1), "model")
    weights = "model.safetensors"
    assert (measured / weights).read_bytes() == (alone / weights).read_bytes()
    rows = read_lines(measured / "metrics.jsonl")
    assert [{name: row[name] for name in row if "eval/" not in name} for row in rows] == read_lines(
        alone / "metrics.jsonl"
    )
    model = AutoModelForCausalLM.from_pretrained(measured).eval()
    losses = [labels_loss(model, *row) for row in APART]
    expected = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
    assert rows[-1]["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_accuracy_and_loss_of_pairs_that_a_reward_model_is_not_trained_on(
    tmp_path: Path, pairs: dict[str, Path]
) -> None:
    """Bradley-Terry by hand, on the scores of the model that the stage leaves."""
    context = run_stage("reward_model", tmp_path, pairs, **SETTINGS)
    metrics = read_lines(output(context, "model") / "metrics.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(output(context, "model")).eval()
    margins = [
        reward_of(model, [*ids(prompt + chosen), EOS]) - reward_of(model, [*ids(prompt + rejected), EOS])
        for prompt, chosen, rejected in PAIRS
    ]
    assert metrics[-1]["eval/accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 3
    assert metrics[-1]["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert all("eval/loss" in row for row in metrics)  # of five steps every one


@pytest.mark.parametrize(
    ("every", "total", "due"),
    [
        (None, 5, [1, 2, 3, 4, 5]),
        (None, 25, [3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (4, 10, [4, 8, 10]),
        (100, 3, [3]),
    ],
)
def test_when_rows_are_measured(every: int | None, total: int, due: list[int]) -> None:
    held_out = HeldOut([], every_steps=every)
    assert [step for step in range(1, total + 1) if held_out.is_due(step, total)] == due


def test_what_cannot_be_measured_is_said(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in (sft, reward_model):
        assert stage.STAGE.check is not None
        (problem,) = stage.STAGE.check(stage.Config(eval_steps=3), frozenset({"model", "dataset"}))
        assert problem == "eval_steps is given, but input eval_dataset is not wired, so it would not be used"
    long = save_dataset(tmp_path / "long", "prompt_completion", [{"prompt": "a" * 30, "completion": "b"}])
    with pytest.raises(DataError, match=r"^input eval_dataset: none of the 1 rows is left .*longer than max_length"):
        run_stage("sft", tmp_path / "none", {**inputs, "eval_dataset": long}, **SETTINGS, truncation_mode="drop")
    monkeypatch.setattr("stages.training.held_out.passes", lambda *_: _nan())
    with pytest.raises(StageError, match=r"loss of input eval_dataset is nan after step 1, .*look at its rows"):
        run_stage("sft", tmp_path / "nan", inputs, **SETTINGS)


def _nan() -> Any:
    from stages.training.metrics import Mean, MetricSums

    sums = MetricSums()
    sums.add({"loss": Mean(torch.tensor(math.nan), 0)})
    return sums


def said_of_overlap(folder: Path) -> list[str]:
    return [line for line in logged(folder / "job") if line.startswith("input eval_dataset: ")]


def test_rows_that_are_trained_on_too_are_said(tmp_path: Path, inputs: dict[str, Path], pairs: dict[str, Path]) -> None:
    """Two of four prompts with completions; the same completion of another prompt is none. One of three pairs."""
    mixed = save_completions(tmp_path / "mixed", eval_dataset=[*ROWS[:2], ("abd", "de"), APART[0]])
    context = run_stage("sft", tmp_path / "sft", {**inputs, "eval_dataset": mixed["eval_dataset"]}, **SETTINGS)
    assert context.counts["eval_rows_trained_on"] == 2
    (line,) = said_of_overlap(tmp_path / "sft")
    assert line.startswith("input eval_dataset: 2 of its 4 rows are trained on too")
    run_stage("reward_model", tmp_path / "pairs", pairs, **SETTINGS)
    (line,) = said_of_overlap(tmp_path / "pairs")
    assert line.startswith("input eval_dataset: 1 of its 3 rows are trained on too")
    run_stage("sft", tmp_path / "none", inputs, **SETTINGS)
    assert not said_of_overlap(tmp_path / "none")


def test_weights_of_rows_are_of_those_that_are_trained(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Of equal weights, which change no step, only the measured rows could make a difference; they need no column."""

    def losses(name: str, apart: list[dict[str, Any]], **settings: Any) -> list[float]:
        rows = [{"prompt": prompt, "completion": completion, "w": 3.0} for prompt, completion in ROWS]
        given = {
            "model": inputs["model"],
            "dataset": save_dataset(tmp_path / name / "rows", "prompt_completion", rows),
            "eval_dataset": save_dataset(tmp_path / name / "apart", "prompt_completion", apart),
        }
        context = run_stage("sft", tmp_path / name, given, **SETTINGS, eval_steps=2, **settings)
        lines = read_lines(output(context, "model") / "metrics.jsonl")
        return [line["eval/loss"] for line in lines if "eval/loss" in line]

    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in APART]
    weighted = [{**row, "w": weight} for row, weight in zip(rows, (0.0, 1.0, 9.0), strict=True)]
    plain = losses("plain", rows)
    assert len(plain) == 3
    assert losses("without", rows, weight_column="w") == pytest.approx(plain, rel=1e-5)
    assert losses("with", weighted, weight_column="w") == pytest.approx(plain, rel=1e-5)
