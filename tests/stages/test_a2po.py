"""The stage `a2po`: its first step worked out independently, which prompts it takes, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from artifacts.errors import DataError, StageError
from stages.a2po import STAGE, Config
from tests.data.characters import ids
from tests.stages.online_runs import PROMPTS, make_inputs
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_dataset, states

SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "train_batch_size": 4,
    "max_steps": 1,
    "max_completion_length": 5,
    "learning_rate": 1e-3,
    "beta1": 0.4,
    "beta2": 0.3,
}
REWARDS = [[1.0, 0.0], [0.0, 0.0], [2.0, 2.0], [0.0, -1.0]]
"""Of the sampled completions of the four prompts."""
VALUES = [0.4 * math.log((math.exp(2.5) + 1) / 2), 0.0, 2.0, 0.4 * math.log((1 + math.exp(-2.5)) / 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    return make_inputs(folder) | {"samples": save_samples(folder / "samples", REWARDS)}


def save_samples(folder: Path, rewards: Sequence[Sequence[float | None]]) -> Path:
    """Completions of the first prompts as `sample` writes them."""
    rows = [
        {"prompt": PROMPTS[index]["prompt"], "completion": "a", "prompt_row_id": f"r{index}", "reward": reward}
        for index, values in enumerate(rewards)
        for reward in values
    ]
    return save_dataset(folder, "prompt_completion", rows)


def trained(made: dict[str, Any], folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run against the other reference."""
    inputs = {
        "model": made["folder"] / "policy",
        "reference": made["folder"] / "reference",
        "dataset": made["rows"],
        "samples": made["samples"],
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    context = run_stage("a2po", folder, inputs, **(SETTINGS | changes))
    return read_lines(output(context, "model") / "metrics.jsonl"), rows_of(output(context, "rollouts"))


def forced(model: Any, rollout: dict[str, Any]) -> float:
    """transformers' own log-probability of a completion."""
    prompt = ids(rollout["prompt"])
    tokens = [*prompt, *rollout["token_ids"]]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(len(prompt), len(tokens)))


def test_the_first_step_by_hand(made: dict[str, Any], tmp_path: Path) -> None:
    """(beta2 (log pi - log pi_ref) - (r - V*))^2 over the three prompts with a sample that earned anything."""
    (row,), rollouts = trained(made, tmp_path, train_batch_size=3)
    values = dict(zip(("r0", "r1", "r2", "r3"), VALUES, strict=True))
    assert {rollout["prompt_row_id"] for rollout in rollouts} == {"r0", "r2", "r3"}
    implicit = [0.3 * (forced(made["policy"], one) - forced(made["reference"], one)) for one in rollouts]
    targets = [one["reward"] - values[one["prompt_row_id"]] for one in rollouts]
    assert [one["advantage"] for one in rollouts] == pytest.approx(targets)
    expected = {
        "loss": sum((left - right) ** 2 for left, right in zip(implicit, targets, strict=True)) / 3,
        "implicit_reward": sum(implicit) / 3,
        "advantage": sum(targets) / 3,
        "v_star": (VALUES[0] + VALUES[2] + VALUES[3]) / 3,
        "reward": sum(one["reward"] for one in rollouts) / 3,
        "objective/kl": sum(implicit) / 0.9,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert not {"reward_std", "completions/duplicate_ratio"} & set(row)  # there are no groups


def test_prompts_that_are_left_out_are_counted(made: dict[str, Any], tmp_path: Path) -> None:
    """One was never right, one was not sampled; the first two are trained."""
    AcceleratorState._reset_state(reset_partial_state=True)
    samples = save_samples(tmp_path / "samples", [[0.0, 1.0], [1.0], [0.0, 0.0]])
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"], "samples": samples}
    context = run_stage("a2po", tmp_path, inputs, **(SETTINGS | {"train_batch_size": 2}))
    assert states(output(context, "model")) == {"used": 2, "all incorrect": 1, "without samples": 1}
    assert {row["prompt_row_id"] for row in rows_of(output(context, "rollouts"))} == {"r0", "r1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = SETTINGS | {"train_batch_size": 3, "filter_all_incorrect": False}
    context = run_stage("a2po", tmp_path / "all", inputs, **settings)
    assert states(output(context, "model")) == {"used": 3, "without samples": 1}


def share(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") / 5 for text in completions]


def test_it_raises_its_reward(made: dict[str, Any], tmp_path: Path) -> None:
    """The share of one letter of twelve; on 4 prompts whose values are all about 0.1."""
    AcceleratorState._reset_state(reset_partial_state=True)
    samples = save_samples(tmp_path / "samples", [[0.1, 0.1]] * 4)
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"], "samples": samples}
    settings = {"learning_rate": 3e-3, "train_batch_size": 32, "max_steps": 15, "beta2": 0.01}
    settings["rewards"] = ["tests.stages.test_a2po:share"]
    context = run_stage("a2po", tmp_path, inputs, **(SETTINGS | settings))
    rows = read_lines(output(context, "model") / "metrics.jsonl")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.08


def test_every_completion_needs_a_reward(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no reward function scored the completion of row r\d .* A\*-PO needs"):
        trained(made, tmp_path, rewards=["tests.stages.online_runs:first_alone"])


@pytest.mark.parametrize(
    ("rewards", "problem"),
    [
        ([[1.0, None]], r"row r1 has no reward"),
        ([[0.0], [0.0]], r"no prompt is left to train on \(2 all incorrect, 2 without samples\)"),
    ],
)
def test_samples_that_do_not_serve(
    made: dict[str, Any], tmp_path: Path, rewards: list[list[float | None]], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        trained(made | {"samples": save_samples(tmp_path / "samples", rewards)}, tmp_path)


def test_samples_of_something_else(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input samples has no column prompt_row_id, reward; give output `completions`"):
        trained(made | {"samples": made["rows"]}, tmp_path)


def test_what_does_not_go_together() -> None:
    assert STAGE.check is not None
    problems = STAGE.check(Config(lora_r=4, lora_dropout=0.1), frozenset({"model", "dataset", "samples"}))
    assert len(problems) == 2 and "no reward" in problems[0] and "lora_dropout" in problems[1]
