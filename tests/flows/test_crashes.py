"""One kill in each of sft, reference_logprobs, preference and rl, of a stage, a supervisor and the flow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.crashes import Kill, outputs, run_with_kills

KILLS = [
    Kill("sft", "flow", 10),
    Kill("reference", "stage", 40),
    Kill("dpo", "supervisor", 8),
    Kill("grpo", "stage", 11),
]


@pytest.mark.slow
def test_killed_runs_end_with_the_artifacts_of_a_clean_run(tmp_path: Path) -> None:
    clean, _ = run_with_kills(tmp_path / "clean", [])
    payload, struck = run_with_kills(tmp_path / "killed", KILLS)
    assert struck >= 1  # the flow lives on after its first stages; a fast stage may end before it is hit
    assert outputs(payload) == outputs(clean)
