"""GRPO learns the same whatever samples: embedded, vLLM in process, a server of vLLM. Seeds are fixed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import flows
from tests.vllm.test_stage import saved, trained

RECIPE = Path(flows.__file__).parent / "recipes" / "engines.yaml"
ENGINES = ("embedded", "vllm", "vllm_server")
MOST_APART, LEAST_GAIN = 0.03, 0.10


def share_of_a(completions: Sequence[str], **_: Any) -> list[float]:
    """Of a completion's characters, those that are an a."""
    return [completion.count("a") / max(1, len(completion)) for completion in completions]


def test_every_engine_reaches_the_same_reward(tmp_path: Path, servers: tuple[dict[str, str], Path]) -> None:
    """A reward that ends near 1: what is left to chance of the samples is small there."""
    inputs = saved(tmp_path / "inputs", tied=True)
    given = {"urls": [servers[0]["tied"]], "weights_folder": str(tmp_path)}
    own: dict[str, dict[str, Any]] = {"embedded": {"rollouts": {}}}
    rewards = {}
    for engine in ENGINES:
        settings = {"rewards": ["tests.vllm.test_learning:share_of_a"], "max_steps": 30, "train_batch_size": 32}
        rollouts = {"engine": engine, **(given if engine == "vllm_server" else {})}
        metrics, _ = trained("rl", inputs, tmp_path / engine, rollouts, **settings, **own.get(engine, {}))
        rewards[engine] = [row["reward"] for row in metrics]
    reached = {engine: fmean(found[-5:]) for engine, found in rewards.items()}
    assert max(found[0] for found in rewards.values()) < 0.5, rewards
    assert min(reached.values()) > 0.9 and max(reached.values()) - min(reached.values()) <= MOST_APART, reached


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_engine_reaches_the_same_accuracy(tmp_path: Path) -> None:
    """Of the recipe that has all three, on problems that no model has seen."""
    wanted = [word for name in ("sft", *ENGINES) for word in ("--until", f"eval_{name}")]
    command = [sys.executable, "-m", "flows.cli", "run", str(RECIPE), "--store", str(tmp_path), "--json", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads(done.stdout)["stages"]
    found = {name: stages[f"eval_{name}"]["metrics"]["accuracy"] for name in ("sft", *ENGINES)}
    reached = [found[name] for name in ENGINES]
    assert max(reached) - min(reached) <= MOST_APART, found
    assert min(reached) >= found["sft"] + LEAST_GAIN, found
