"""Runs of on-line stages on random models of a few letters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.errors import StageError
from stages.training.token_table import TokenTable
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_dataset, save_model

PROMPTS = [{"prompt": prompt, "completion": ""} for prompt in ("abc", "da", "hgf", "cab")]


def make_inputs(folder: Path) -> dict[str, Any]:
    """A policy, another reference, and prompts."""
    return {
        "policy": save_model(folder / "policy", seed=1),
        "reference": save_model(folder / "reference", seed=2),
        "folder": folder,
        "rows": save_dataset(folder / "rows", "prompt_completion", PROMPTS),
    }


def trained(
    stage: str, made: dict[str, Any], folder: Path, settings: dict[str, Any], *, other_reference: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of metrics, rollouts) of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"]}
    if other_reference:
        inputs["reference"] = made["folder"] / "reference"
    context = run_stage(stage, folder, inputs, **settings)
    return read_lines(output(context, "model") / "metrics.jsonl"), rows_of(output(context, "rollouts"))


def beta_changes(run: Callable[..., list[dict[str, Any]]], folder: Path) -> None:
    """Four prompts, half a pass a step, and weights that stay: steps are those of runs with one beta each.

    `run`: (folder, **settings) -> rows of metrics.
    """
    changes = {"train_batch_size": 2, "max_steps": 5, "learning_rate": 1e-30}
    rows = run(folder / "both", beta=[0.2, 0.7], **changes)
    plain = {beta: run(folder / str(beta), beta=beta, **changes) for beta in (0.2, 0.7)}
    betas = [row.pop("beta") for row in rows]
    assert betas == [0.2, 0.2, 0.7, 0.7, 0.7]
    for step, (row, beta) in enumerate(zip(rows, betas, strict=True)):
        assert row == pytest.approx(plain[beta][step], rel=1e-6)
    assert rows[2]["loss"] != pytest.approx(plain[0.2][2]["loss"], rel=1e-3)


def first_alone(completions: list[str], **_: Any) -> list[float | None]:
    """A reward: only the first completion of all is scored."""
    return [1.0, *[None] * (len(completions) - 1)]


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of one letter of twelve in six."""
    return [text.count("a") / 6 for text in completions]


def assert_sampler_out_of_step_is_an_error(run: Callable[[], Any]) -> None:
    """The first generation's log-probabilities, moved by one nat."""
    original = TokenTable.of

    def moved(groups: Any, old: Any, *others: Any) -> TokenTable:
        return original(groups, [[[value - 1 for value in one] for one in group] for group in old], *others)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StageError, match="the sampler has other weights"):
        patch.setattr(TokenTable, "of", moved)
        run()
