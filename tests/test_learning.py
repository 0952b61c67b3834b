"""On-line algorithms learn: each raises the held-out accuracy of the same model by ten points. Seeds are fixed.

Not among the tests that always run are all six of them (some four minutes on two cores): `pytest -m nightly`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flows

RECIPE = Path(flows.__file__).parent / "recipes" / "online.yaml"
LEAST_GAIN = 0.10


def accuracies(store: Path, *names: str) -> dict[str, float]:
    """Algorithm -> accuracy on problems that none has seen; `sft` is where all start."""
    wanted = [word for name in names for word in ("--until", f"eval_{name}")]
    command = [sys.executable, "-m", "flows.cli", "run", str(RECIPE), "--store", str(store), "--json", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads(done.stdout)["stages"]
    return {name: stages[f"eval_{name}"]["metrics"]["accuracy"] for name in names}


@pytest.mark.slow
def test_one_algorithm_learns(tmp_path: Path) -> None:
    found = accuracies(tmp_path, "sft", "online_dpo")
    assert found["online_dpo"] >= found["sft"] + LEAST_GAIN, found


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_all_algorithms_learn(tmp_path: Path) -> None:
    algorithms = ("grpo", "rloo", "dapo", "gspo", "ppo", "online_dpo")
    found = accuracies(tmp_path, "sft", *algorithms)
    weak = [name for name in algorithms if found[name] < found["sft"] + LEAST_GAIN]
    assert not weak, found
