"""Input `eval_dataset` of the stages whose loss knows more than a row: a reference, other rows, the run so far.

Where a step takes all rows, and they are held out too, what is measured after a step is what the next one begins with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from stages import preference, process_reward_model, unpaired_preference
from stages.losses.preference import PREFERENCE_LOSSES
from tests.stages.small_models import labels_loss, output, read_lines, run_stage, save_dataset, save_model

BETA = 0.4
GOLD = [
    {"prompt": "abc", "chosen": "de", "rejected": "fghab", "reference": "aa"},
    {"prompt": "da", "chosen": "bbc", "rejected": "c", "reference": "bcd"},
    {"prompt": "hgf", "chosen": "e", "rejected": "dd", "reference": "e"},
]
PAIRS = [{name: text for name, text in row.items() if name != "reference"} for row in GOLD]
APART = [{"prompt": "cab", "chosen": "aabb", "rejected": "ha"}, {"prompt": "ge", "chosen": "a", "rejected": "bcb"}]
JUDGED = [
    {"prompt": "abc", "completion": "de", "label": True},
    {"prompt": "da", "completion": "bbc", "label": False},
    {"prompt": "hgf", "completion": "e", "label": True},
    {"prompt": "hgf", "completion": "dd", "label": False},
]
STEPS = [
    {"prompt": "abc", "completions": ["de", "f"], "labels": [True, False]},
    {"prompt": "gf", "completions": ["e"], "labels": [False]},
]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3, "eval_steps": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model", seed=1)
    rows = {
        "preference": PAIRS,
        "triple_preference": GOLD,
        "unpaired_preference": JUDGED,
        "stepwise_supervision": STEPS,
    }
    found = {kind: save_dataset(folder / kind, kind, given) for kind, given in rows.items()}
    return {**found, "model": folder / "model", "apart": save_dataset(folder / "apart", "preference", APART)}


def train(stage: str, folder: Path, inputs: dict[str, Path], **settings: Any) -> Path:
    return output(run_stage(stage, folder, inputs, **(SETTINGS | settings)), "model")


def require_next_step(metrics: list[dict[str, float]], *, names: int) -> None:
    """Everything that is measured after a step is in the next one's row."""
    assert len(metrics) == 3
    for measured, following in pairwise(metrics):
        found = {name.removeprefix("eval/"): value for name, value in measured.items() if name.startswith("eval/")}
        assert len(found) >= names and found == pytest.approx({name: following[name] for name in found}, rel=1e-4)
        assert measured["loss"] != pytest.approx(following["loss"], rel=1e-4)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_pairs_under_every_loss(tmp_path: Path, made: dict[str, Path], name: str) -> None:
    loss = PREFERENCE_LOSSES[name]
    rows = made["triple_preference" if loss.gold else "preference"]
    inputs = {"model": made["model"], "dataset": rows, "eval_dataset": rows}
    settings = dict.fromkeys(loss.needs, 0.1)
    folder = train(
        "preference", tmp_path, inputs, loss_type=name, beta=BETA, train_batch_size=3, learning_rate=1e-3, **settings
    )
    require_next_step(read_lines(folder / "metrics.jsonl"), names=9)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_judged_completions(tmp_path: Path, made: dict[str, Path], name: str) -> None:
    rows = made["unpaired_preference"]
    inputs = {"model": made["model"], "dataset": rows, "eval_dataset": rows}
    folder = train("unpaired_preference", tmp_path, inputs, loss_type=name, train_batch_size=4, learning_rate=1e-3)
    require_next_step(read_lines(folder / "metrics.jsonl"), names=7)


def test_judged_steps(tmp_path: Path, made: dict[str, Path]) -> None:
    rows = made["stepwise_supervision"]
    inputs = {"model": made["model"], "dataset": rows, "eval_dataset": rows}
    folder = train("process_reward_model", tmp_path, inputs, train_batch_size=2, step_separator="h")
    require_next_step(read_lines(folder / "metrics.jsonl"), names=2)


def sums(folder: Path, rows: list[dict[str, Any]], *sides: str) -> list[list[float]]:
    """transformers' own summed log-probability of every side of every row."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [[-labels_loss(model, row["prompt"], row[side])[0] for side in sides] for row in rows]


def dpo(policy: list[list[float]], reference: list[list[float]]) -> float:
    """The mean loss of pairs (Rafailov et al., arXiv:2305.18290, eq. 7)."""
    margins = [
        BETA * ((chosen - before_chosen) - (rejected - before_rejected))
        for (chosen, rejected), (before_chosen, before_rejected) in zip(policy, reference, strict=True)
    ]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


def test_rows_apart_have_references_of_their_own(tmp_path: Path, made: dict[str, Path]) -> None:
    """By hand; the same from artifacts; and the training does not know of them."""
    inputs = {"model": made["model"], "dataset": made["preference"]}
    apart = {**inputs, "eval_dataset": made["apart"]}
    settings = {"beta": BETA, "train_batch_size": 2}
    folder = train("preference", tmp_path / "here", apart, **settings)
    rows = read_lines(folder / "metrics.jsonl")
    before, after = (sums(model, APART, "chosen", "rejected") for model in (made["model"], folder))
    assert rows[-1]["eval/loss"] == pytest.approx(dpo(after, before), rel=1e-4)
    kept = {
        name: output(run_stage("reference_logprobs", tmp_path / name, {**inputs, "dataset": dataset}), "logprobs")
        for name, dataset in (
            ("reference_logprobs", made["preference"]),
            ("eval_reference_logprobs", made["apart"]),
        )
    }
    assert read_lines(train("preference", tmp_path / "kept", {**apart, **kept}, **settings) / "metrics.jsonl") == rows
    alone = train("preference", tmp_path / "alone", inputs, **settings, eval_steps=None)
    assert (alone / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def aot(policy: list[list[float]], reference: list[list[float]]) -> float:
    """Sorted log-ratios of all pairs against each other (Melnyk et al., arXiv:2406.05882)."""
    ratios, before = (sorted(chosen - rejected for chosen, rejected in rows) for rows in (policy, reference))
    return sum(math.log1p(math.exp(-BETA * (one - other))) for one, other in zip(ratios, before, strict=True)) / 2


@pytest.mark.parametrize(("name", "by_hand"), [("sigmoid", dpo), ("aot", aot)])
def test_the_reference_that_follows_is_measured_as_it_is(
    tmp_path: Path, made: dict[str, Path], name: str, by_hand: Callable[..., float]
) -> None:
    """One that becomes the policy before every step is, after three steps, the policy of two."""
    inputs = {"model": made["model"], "dataset": made["preference"], "eval_dataset": made["apart"]}
    settings: dict[str, Any] = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    settings |= {"beta": BETA, "train_batch_size": 2, "loss_type": name}
    three = train("preference", tmp_path / "three", inputs, **settings)
    two = train("preference", tmp_path / "two", inputs, **settings, max_steps=2)
    before, after = (sums(model, APART, "chosen", "rejected") for model in (two, three))
    assert read_lines(three / "metrics.jsonl")[-1]["eval/loss"] == pytest.approx(by_hand(after, before), rel=1e-4)


def test_the_reward_shift_is_that_of_the_training_so_far(tmp_path: Path, made: dict[str, Path]) -> None:
    """Measuring moves it no more than the rows that are trained on do without it."""
    inputs = {"model": made["model"], "dataset": made["preference"]}
    settings = {"loss_type": "bco", "beta": BETA, "train_batch_size": 4}
    folder = train("unpaired_preference", tmp_path / "run", {**inputs, "eval_dataset": made["apart"]}, **settings)
    rows = read_lines(folder / "metrics.jsonl")
    total = 0.0
    before, after = (sums(model, APART, "chosen", "rejected") for model in (made["model"], folder))
    for now, then in zip(after, before, strict=True):
        for value, reference, sign in zip(now, then, (1, -1), strict=True):
            total += math.log1p(math.exp(-sign * (BETA * (value - reference) - rows[-1]["delta"])))
    assert rows[-1]["eval/loss"] == pytest.approx(total / 4, rel=1e-4)
    assert rows[-1]["eval/delta"] == pytest.approx(rows[-1]["delta"])
    assert rows[-1]["eval/rewards/margins"] == pytest.approx(
        rows[-1]["eval/rewards/chosen"] - rows[-1]["eval/rewards/rejected"]
    )
    alone = train("unpaired_preference", tmp_path / "alone", inputs, **settings, eval_steps=None)
    assert (alone / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_what_does_not_go_together() -> None:
    model = {"model", "dataset"}
    for stage in (preference, unpaired_preference):
        check: Any = stage.STAGE.check
        assert check(stage.Config(), frozenset({*model, "eval_dataset"})) == []
        (said,) = check(stage.Config(), frozenset({*model, "eval_dataset", "reference_logprobs"}))
        assert said == (
            "reference_logprobs are of input dataset; wire eval_reference_logprobs too, from a stage "
            "reference_logprobs on eval_dataset"
        )
        first, second = check(stage.Config(), frozenset({*model, "eval_reference_logprobs"}))
        assert first == (
            "input eval_reference_logprobs is given, but input eval_dataset is not wired, so it would not be used"
        )
        assert second == "eval_reference_logprobs is wired in, but reference_logprobs is not; both are of one model"
    check = unpaired_preference.STAGE.check
    weighed = unpaired_preference.Config(loss_type="bco", use_density_ratio=True)
    (said,) = check(weighed, frozenset({*model, "eval_dataset"}))
    assert "rows of eval_dataset have no weight" in said
    check = process_reward_model.STAGE.check
    (said,) = check(process_reward_model.Config(eval_steps=2), frozenset(model))
    assert said == "eval_steps is given, but input eval_dataset is not wired, so it would not be used"
