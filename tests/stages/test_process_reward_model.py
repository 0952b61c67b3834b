"""The stage `process_reward_model`: its first step against transformers' own loss, and what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from stages.losses.reward import step_cross_entropy
from stages.training.classifiers import load_step_judge
from tests.data.characters import ids
from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model

ROWS = [
    {"prompt": "abc", "completions": ["de", "f"], "labels": [True, False]},
    {"prompt": "da", "completions": ["bbc", "aa", "e"], "labels": [True, True, True]},
    {"prompt": "gf", "completions": ["e"], "labels": [False]},
    {"prompt": "cab", "completions": ["aab", "ff"], "labels": [False, False]},
]
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "train_batch_size": 4,
    "max_steps": 2,
    "step_separator": "h",
    "seed": 3,
}


def train(folder: Path, model: Path, **config: Any) -> Path:
    dataset = save_dataset(folder / "rows", "stepwise_supervision", ROWS)
    context = run_stage("process_reward_model", folder, {"model": model, "dataset": dataset}, **(SETTINGS | config))
    return output(context, "model")


def test_a_number_and_its_gradient() -> None:
    # logits (0, log 3): probabilities 1/4 and 3/4
    logits = torch.tensor([[0.0, 1.098612289], [0.0, 1.098612289]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, False])
    losses = step_cross_entropy(logits, labels)
    torch.testing.assert_close(losses, torch.tensor([0.287682072, 1.386294361], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda values: step_cross_entropy(values, labels), [logits])
    assert torch.equal(step_cross_entropy(logits[1:], labels[1:]), losses[1:])


@pytest.mark.parametrize("budget", [8192, 8])
@pytest.mark.parametrize("last", [False, True])
def test_first_step_is_transformers_own_loss(tmp_path: Path, budget: int, last: bool) -> None:
    """Labels at the last token of every separator, the mean over all steps of the batch, in any micro-batches."""
    save_model(tmp_path / "model", seed=1)
    judge = load_step_judge(tmp_path / "model", new_head_seed=3).eval()
    total, right, count = torch.zeros(()), 0, 0
    for row in ROWS:
        tokens, labels = ids(row["prompt"]), [-100] * len(row["prompt"])
        for number, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True), start=1):
            tokens += ids(step + "h")
            judged = not last or number == len(row["labels"])
            labels += [-100] * len(step) + [int(label) if judged else -100]
        steps = sum(label != -100 for label in labels)
        found = judge(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels]))
        total, count = total + found.loss * steps, count + steps
        answers = zip(found.logits[0].argmax(-1).tolist(), labels, strict=True)
        right += sum(answer == label for answer, label in answers)
    assert count == (4 if last else 8)
    folder = train(tmp_path / "run", tmp_path / "model", train_on_last_step_only=last, micro_batch_tokens=budget)
    first, second = read_lines(folder / "metrics.jsonl")
    gradients = torch.autograd.grad(total / count, list(judge.parameters()))
    assert first["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["accuracy"] == pytest.approx(right / count)
    assert second["loss"] < first["loss"]


def test_it_learns_and_loads_without_us(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1)
    folder = train(tmp_path / "run", tmp_path / "model", max_steps=60, learning_rate=1e-2)
    assert read_lines(folder / "metrics.jsonl")[-1]["accuracy"] == 1.0
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.num_labels == 2 and load_file(folder / "model.safetensors")["score.weight"].shape == (2, 16)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids("abcdehfh")])).logits[0]
    assert logits[[5, 7]].argmax(-1).tolist() == [1, 0]
    assert load_step_judge(folder).score.weight.equal(model.score.weight)
