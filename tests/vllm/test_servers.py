"""Several servers of vLLM: one is killed amid rollouts, and then the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.stages.small_models import read_lines, rows_of
from tests.vllm.test_stage import saved
from tests.waiting import LEFT_SECONDS

ROOT = Path(__file__).parents[2]


def test_killed_servers_and_trainers(in_process: Callable[..., Any], tmp_path: Path) -> None:
    """Of two servers one is killed with completions under way: all is as with vLLM in process, which nothing disturbs.
    The trainer is killed while the other one serves and that one is being started again: soon nothing of them is
    there."""
    folder, inputs = tmp_path / "disturbed", saved(tmp_path / "inputs", tied=True)
    trainer = subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.disturbed", folder, inputs["model"], inputs["dataset"]],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    metrics, undisturbed = in_process(True, None)
    assert trainer.stdout is not None
    try:
        while (line := trainer.stdout.readline()) and line.strip() != "trained":
            pass
        assert line, (folder / "job" / "events.jsonl").read_text()
        processes = psutil.Process(trainer.pid).children(recursive=True)
        assert len(processes) >= 5
    finally:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    _, alive = psutil.wait_procs(processes, timeout=LEFT_SECONDS)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]

    asked = json.loads((folder / "asked.json").read_text())
    assert not Path(asked["folder"]).exists()
    assert (asked["name"], asked["before"], asked["after"]) == (
        Path(asked["folder"]).name,
        "default",
        "run-000000007",
    )
    assert (folder / "job" / "vllm-1.log").exists() and (folder / "job" / "vllm-2.log").exists()
    events = (folder / "job" / "events.jsonl").read_text()
    assert "vLLM server 2 of 2: it was killed" in events and "it is started again, 1 of 3 times" in events
    made = rows_of(folder / "job" / "out" / "rollouts")
    for name in ("row_id", "token_ids", "weight_versions", "reward"):
        assert [row.get(name) for row in made] == [row.get(name) for row in undisturbed], name
    assert len(made) == 48
    losses = [row["loss"] for row in read_lines(folder / "job" / "out" / "model" / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in metrics], abs=1e-5)
