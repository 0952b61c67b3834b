"""Preference accuracy of `evaluate` against transformers' own log-probabilities and scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.characters import ids
from tests.stages.small_models import (
    EOS,
    labels_loss,
    output,
    read_lines,
    reward_of,
    run_stage,
    save_dataset,
    save_model,
)

PAIRS = [("abc", "de", "f"), ("hg", "a", "bb"), ("a b", "hhh", "gg"), ("e", "bad", "cab"), ("fa", "b", "dddd")]


def pair_rows() -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]


def pair_logps(model: torch.nn.Module) -> list[tuple[float, float]]:
    return [tuple(-labels_loss(model, p, text)[0] for text in (c, r)) for p, c, r in PAIRS]


def test_preference_accuracy_without_a_reference_compares_log_probabilities(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "preference", pair_rows())
    context = run_stage("evaluate", tmp_path / "run", {"model": tmp_path / "model", "dataset": data})
    margins = [chosen - rejected for chosen, rejected in pair_logps(model)]
    assert 0 < sum(margin > 0 for margin in margins) < len(margins)
    assert context.metrics["preference/accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert context.metrics["preference/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert "logps/chosen" in context.metrics and "rewards/chosen" not in context.metrics


def test_preference_accuracy_by_implicit_rewards(tmp_path: Path) -> None:
    model, reference = save_model(tmp_path / "model", seed=1), save_model(tmp_path / "reference", seed=2)
    data = save_dataset(tmp_path / "data", "preference", pair_rows())
    inputs = {"model": tmp_path / "model", "dataset": data}
    loaded = run_stage("evaluate", tmp_path / "a", {**inputs, "reference": tmp_path / "reference"}, beta=0.3)
    scored = run_stage("reference_logprobs", tmp_path / "b", {"model": tmp_path / "reference", "dataset": data})
    given = run_stage(
        "evaluate", tmp_path / "c", {**inputs, "reference_logprobs": output(scored, "logprobs")}, beta=0.3
    )
    expected = [
        tuple(0.3 * (own - other) for own, other in zip(pair, before, strict=True))
        for pair, before in zip(pair_logps(model), pair_logps(reference), strict=True)
    ]
    for context in (loaded, given):
        records = read_lines(output(context, "evaluation") / "samples.jsonl")
        for record, (chosen, rejected) in zip(records, expected, strict=True):
            assert record["chosen_score"] == pytest.approx(chosen, abs=1e-4)
            assert record["rejected_score"] == pytest.approx(rejected, abs=1e-4)
        assert context.metrics["preference/accuracy"] == sum(a > b for a, b in expected) / len(expected)
        assert context.metrics["rewards/chosen"] == pytest.approx(sum(a for a, _ in expected) / 5, abs=1e-4)


def test_preference_accuracy_of_a_reward_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", seed=4, reward=True)
    data = save_dataset(tmp_path / "data", "preference", pair_rows())
    context = run_stage("evaluate", tmp_path / "run", {"model": tmp_path / "model", "dataset": data})
    expected = [tuple(reward_of(model, [*ids(p), *ids(t), EOS]) for t in (c, r)) for p, c, r in PAIRS]
    records = read_lines(output(context, "evaluation") / "samples.jsonl")
    for record, (chosen, rejected) in zip(records, expected, strict=True):
        assert (record["chosen_score"], record["rejected_score"]) == pytest.approx((chosen, rejected), abs=1e-5)
        assert record["correct"] == (chosen > rejected)
    assert context.metrics["preference/accuracy"] == sum(a > b for a, b in expected) / len(expected)
