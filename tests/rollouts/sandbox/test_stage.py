"""Reward `code` in a stage of its own process's making: columns, records and metrics of real artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.context import local_context
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.training.rollout_export import write_rollouts
from stages.training.rollout_records import Recorder, Sampled
from tests.stages.small_models import output, rows_of, run_stage, save_dataset

SQUARE = "```python\ndef f(n):\n    return n * n\n```"
CUBE = "```python\ndef f(n):\n    return n ** 3\n```"
EXIT = "```python\nimport os\nos._exit(0)\n```"
TESTS = {"square": ["assert f(3) == 9", "assert f(0) == 0"], "cube": ['{"call": "f(3)", "expected": 27}']}
MADE = {"square": [SQUARE, CUBE, EXIT], "cube": [SQUARE, CUBE, "I do not know."]}


@pytest.mark.usefixtures("confining_kernel")
def test_rollouts_are_scored_by_their_rows_tests(tmp_path: Path) -> None:
    rows = [{"prompt": name, "completion": "?", "tests": tests} for name, tests in TESTS.items()]
    dataset = save_dataset(tmp_path / "rows", "prompt_completion", rows)
    context = local_context("rl", {"rewards": ["exact_match"]}, folder=tmp_path / "run", inputs={})
    recorder = Recorder(context, num_generations=3, total_steps=1)
    groups = [
        Sampled(
            TokenizedPrompt(f"r{number}", [7], {"prompt": name}),
            [Completion([5], [-0.5], finished=True) for _ in texts],
            texts,
            {"exact_match": [0.0] * 3},
            [0.0] * 3,
        )
        for number, (name, texts) in enumerate(MADE.items())
    ]
    recorder.save(0, 0, groups, [[0.0] * 3] * 2)
    write_rollouts(context, 1)
    inputs = {"rollouts": output(context, "rollouts"), "dataset": dataset}
    rewards = [{"name": "code", "parameters": {"workers": 1, "credit": "share"}}]
    scored = run_stage("rescore", tmp_path / "scored", inputs, rewards=rewards)
    # of the squares' two tests a cube passes f(0) == 0
    assert [row["reward_code"] for row in rows_of(output(scored, "rollouts"))] == [1.0, 0.5, 0.0, 0.0, 1.0, 0.0]
    assert scored.metrics["rewards/code/mean"] == pytest.approx(2.5 / 6)
