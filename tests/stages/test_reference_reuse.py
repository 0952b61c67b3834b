"""Reference log-probabilities are computed once: other losses, betas and recipes find them in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.in_process import run_here, states
from tests.tiny_recipe import metrics_of, write_recipe

SHORT = {"max_steps": 1, "train_batch_size": 4, "max_length": 48}
INPUTS = {"model": "base", "dataset": "pairs"}
REFERENCE = {"uses": "reference_logprobs", "inputs": INPUTS, "with": {"max_length": 48, "per_token": True}}


def recipe_of(folder: Path, trained: dict[str, dict[str, Any]]) -> Path:
    """Preference stages that read one reference."""
    stages = {
        name: {"uses": "preference", "inputs": {**INPUTS, "reference_logprobs": "kept"}, "with": SHORT | settings}
        for name, settings in trained.items()
    }
    return write_recipe(folder, {"kept": REFERENCE, **stages})


def test_once_for_all(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = run_here(recipe_of(tmp_path / "first", {"dpo": {"beta": 0.1}}), store)
    assert set(states(first).values()) == {"ran"}
    others: dict[str, dict[str, Any]] = {
        "strict": {"beta": 0.7},
        "square": {"loss_type": "ipo", "beta": 0.5},
        "tails": {"ld_alpha": 0.5},  # needs every token, which the artifact has besides the sums
        "coupled": {"loss_type": ["aot", "sft"], "beta": 0.2},
    }
    second = run_here(recipe_of(tmp_path / "second", others), store)
    assert {name for name, state in states(second).items() if state == "ran"} == set(others)
    kept = second["stages"]["kept"]
    assert (kept["state"], kept["outputs"]) == ("cached", first["stages"]["kept"]["outputs"])
    # and they are the right ones: policy and reference are one model, so at the first step no reward has moved
    for name in others:
        row = metrics_of(store, second["stages"][name])[0]
        assert abs(row["rewards/chosen"]) < 1e-5 and abs(row["rewards/rejected"]) < 1e-5
    square = metrics_of(store, second["stages"]["square"])[0]
    assert abs(square["loss"] - 1.0) < 1e-5  # (0 - 1 / (2 beta))^2
