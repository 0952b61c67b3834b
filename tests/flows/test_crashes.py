"""A few kills of a stage, a supervisor, a rank and the flow; in full: `python -m tests.campaigns process_kills`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.outcome import Outcome
from tests.campaigns.process_kills import STAGES, Kill, Site, outputs
from tests.in_process import run_here
from tests.prefect_homes import NewHome

KILLED = ("sft", "two_ranks", "reference", "dpo", "grpo")
INPUTS = {"dpo": {"model": "sft", "dataset": "pairs"}, "grpo": {"model": "sft", "dataset": "rows"}}
"""So that after `sft` no stage waits for another one, and all are killed in one run."""
ROUNDS = [
    [Kill("sft", "flow", step=10)],
    [
        Kill("reference", "stage", step=40),
        Kill("two_ranks", "rank", step=20),
        Kill("dpo", "supervisor", step=8),
        Kill("grpo", "stage", step=11),
    ],
]


@pytest.mark.slow
def test_killed_runs_end_with_the_artifacts_of_a_clean_run(tmp_path: Path, new_prefect_home: NewHome) -> None:
    stages = {name: STAGES[name] | {"inputs": INPUTS.get(name, STAGES[name]["inputs"])} for name in KILLED}
    clean = Site(tmp_path / "clean", stages)
    expected = outputs(run_here(clean.recipe, clean.store))
    outcome = Outcome(seed=0)
    killed = Site(tmp_path / "killed", stages)
    new_prefect_home(killed.folder / "prefect")
    run_here(killed.recipe, killed.store, until=("base", "pairs"))  # which nobody kills
    payload = killed.run_with(ROUNDS, outcome)
    assert payload is not None and outputs(payload) == expected
    resumed = [entry for entry in payload["stages"].values() if entry["resumed_from"] is not None]
    assert all(entry["earlier_seconds"] > 0 for entry in resumed)
    # the flow lives on after its first stages; a fast stage may end before it is hit
    assert outcome.counts["SIGKILLs"] >= 1 and outcome.anomalies == []
