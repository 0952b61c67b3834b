"""Runs of on-line stages on random models of a few letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

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
