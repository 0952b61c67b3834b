"""Two processes that train together, each with vLLM inside it, give the run of one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages.context import local_context
from tests.stages.small_models import read_lines, rows_of
from tests.vllm.test_stage import saved, settings_of


def test_each_has_an_engine_of_its_own(in_process: Callable[..., Any], tmp_path: Path) -> None:
    """Both are sent all weights after every step, each proves its own completions, and together they are those of one
    process."""
    metrics, alone = in_process(True, None)
    inputs = saved(tmp_path / "inputs", tied=True)
    context = local_context("rl", settings_of("rl", {"engine": "vllm"}), folder=tmp_path / "run", inputs=dict(inputs))
    job = Path(context.spec.job)
    (job / "spec.json").write_text(json.dumps(asdict(replace(context.spec, processes=2))))
    command = stage_command(Launch(processes=2), job, threads=1)
    done = subprocess.run(
        command.arguments, env=stage_environment(command), cwd=job, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (model,), (rollouts,) = ((tmp_path / "run/store/artifacts" / kind).glob("*/files") for kind in ("model", "dataset"))
    made = rows_of(rollouts)
    assert len(made) == 48
    for name in ("row_id", "token_ids", "weight_versions", "reward"):
        assert [row[name] for row in made] == [row[name] for row in alone], name
    found = read_lines(model / "metrics.jsonl")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in metrics], abs=1e-5)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in found)
