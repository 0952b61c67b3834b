"""Two processes over gloo through the launcher give the steps of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_recipe import metrics_of, run_recipe, write_recipe

SFT = {"learning_rate": 1e-2, "max_steps": 6, "train_batch_size": 8, "max_length": 64}


@pytest.mark.slow
def test_two_processes_and_other_micro_batches_equal_one(tmp_path: Path) -> None:
    """Only operational settings differ, so each variant starts from a copy of one prepared store."""
    run_recipe(write_recipe(tmp_path / "recipe", {}), tmp_path / "prepared")
    found: dict[str, list[dict[str, float]]] = {}
    for name, processes, budget in (("8x1", 1, 4096), ("1x8", 1, 1), ("two processes", 2, 16)):
        stage: dict[str, Any] = {
            "uses": "sft",
            "inputs": {"model": "base", "dataset": "rows"},
            "with": {**SFT, "micro_batch_tokens": budget},
            "launch": {"processes": processes},
        }
        store = tmp_path / name
        shutil.copytree(tmp_path / "prepared", store)
        entries = run_recipe(write_recipe(tmp_path / "recipe", {"sft": stage}), store)
        assert entries["base"]["state"] == "cached"
        found[name] = metrics_of(store, entries["sft"])
    assert len(found["8x1"]) == 6
    for name in ("1x8", "two processes"):
        for expected, row in zip(found["8x1"], found[name], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert row["num_tokens"] == expected["num_tokens"]
