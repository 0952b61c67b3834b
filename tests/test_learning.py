"""On-line algorithms learn: each raises the held-out accuracy of the same model by ten points. Seeds are fixed.

Not among the tests that always run are all eight of them (minutes, on two cores): `pytest -m nightly`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

import flows
from artifacts import open_store
from tests.in_process import failures, run_here

RECIPE = Path(flows.__file__).parent / "recipes" / "online.yaml"
LEAST_GAIN = 0.10


def accuracies(store: Path, *names: str, settings: Sequence[str] = ()) -> dict[str, float]:
    """Algorithm -> accuracy on problems that none has seen; `sft` is where all start."""
    payload = run_here(RECIPE, store, settings, until=[f"eval_{name}" for name in names])
    assert payload["state"] == "ok", failures(payload)
    stages = payload["stages"]
    return {name: stages[f"eval_{name}"]["metrics"]["accuracy"] for name in names}


@pytest.mark.slow
def test_one_algorithm_learns(tmp_path: Path) -> None:
    """In half of the recipe's steps: it gains twice as much as is asked for in six of ten."""
    found = accuracies(tmp_path, "sft", "online_dpo", settings=["online_dpo.max_steps=50"])
    assert found["online_dpo"] >= found["sft"] + LEAST_GAIN, found


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_all_algorithms_learn(tmp_path: Path) -> None:
    algorithms = ("grpo", "rloo", "dapo", "gspo", "ppo", "online_dpo", "nash_md", "a2po")
    found = accuracies(tmp_path, "sft", *algorithms)
    weak = [name for name in algorithms if found[name] < found["sft"] + LEAST_GAIN]
    assert not weak, found


def rewards(store: Path, recipe: str, steps: int) -> list[float]:
    """Mean reward of every step of stage `grpo`."""
    payload = run_here(RECIPE.parent / recipe, store, [f"grpo.max_steps={steps}"])
    opened = open_store(str(store))
    model = opened.materialize(opened.find(payload["stages"]["grpo"]["outputs"]["model"]["id"]))
    lines = (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reward"] for line in lines]


@pytest.mark.slow
def test_an_environment_is_learnt(tmp_path: Path) -> None:
    """The first third of the recipe's steps."""
    found = rewards(tmp_path, "number_guessing.yaml", 20)
    assert fmean(found[-4:]) >= fmean(found[:2]) + 0.05, found


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recipe", "steps", "least"), [("number_guessing.yaml", 60, 0.8), ("calculator.yaml", 40, 0.8)]
)
def test_tools_and_environments_are_learnt(recipe: str, steps: int, least: float, tmp_path: Path) -> None:
    found = rewards(tmp_path, recipe, steps)
    assert fmean(found[:2]) < 0.65 and fmean(found[-4:]) >= least, found
