"""Two processes that train together, with vLLM inside each or over both, give the run of one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages.context import local_context
from tests.stages.small_models import read_lines, rows_of
from tests.vllm.models import worst
from tests.vllm.test_stage import processes_of, saved, settings_of

DEADLY = """
import os, signal, sys
import stages.__main__
from stages.rollouts.vllm_engine import VllmEngine
plain, generations = VllmEngine._generate, 0

def deadly(self, questions):
    global generations
    generations += 1
    if generations == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, questions)

VllmEngine._generate = deadly
sys.exit(stages.__main__.main([sys.argv[1]]))
"""


def launched(
    folder: Path, inputs: dict[str, Path], program: Sequence[str], **engine: Any
) -> subprocess.CompletedProcess[str]:
    """Two processes that train, run by `program`."""
    settings = settings_of("rl", {"engine": "vllm", **engine}, checkpoint_steps=1)
    context = local_context("rl", settings, folder=folder / "run", inputs=dict(inputs))
    job = Path(context.spec.job)
    (job / "spec.json").write_text(json.dumps(asdict(replace(context.spec, processes=2))))
    command = stage_command(Launch(processes=2), job, threads=1)
    assert command.arguments[-3:-1] == ["-m", "stages"]
    arguments = [*command.arguments[:-3], *program, command.arguments[-1]]
    return subprocess.run(
        arguments, env=stage_environment(command), cwd=job, capture_output=True, text=True, timeout=200
    )


def assert_it_is_the_run_of_one(folder: Path, one: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """Tokens and rewards are the same, numbers but for the order of sums."""
    metrics, alone = one
    (model,), (rollouts,) = ((folder / "run/store/artifacts" / kind).glob("*/files") for kind in ("model", "dataset"))
    made = rows_of(rollouts)
    assert len(made) == 48
    for name in ("row_id", "token_ids", "weight_versions", "reward"):
        assert [row[name] for row in made] == [row[name] for row in alone], name
    assert worst([row["logprobs"] for row in made], [row["logprobs"] for row in alone]) < 1e-4
    found = read_lines(model / "metrics.jsonl")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in metrics], abs=1e-5)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in found)


def test_each_has_an_engine_of_its_own(in_process: Callable[..., Any], tmp_path: Path) -> None:
    """Both are sent all weights after every step, each proves its own completions."""
    done = launched(tmp_path, saved(tmp_path / "inputs", tied=True), ["-m", "stages"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_it_is_the_run_of_one(tmp_path, in_process(True, None))


def test_they_share_one_engine_and_one_of_them_is_killed(in_process: Callable[..., Any], tmp_path: Path) -> None:
    """Each has half of its weights, so in the third generation the other waits for sums that will not come: it ends as
    well, nothing of the two is left in shared memory, and the run goes on from its checkpoint."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    inputs = saved(tmp_path / "inputs", tied=True)
    killed = launched(tmp_path, inputs, [str(tmp_path / "deadly.py")], tensor_parallel_size=2)
    assert killed.returncode != 0 and "Signal 9" in killed.stderr, killed.stderr[-3000:]
    assert not processes_of(tmp_path)
    done = launched(tmp_path, inputs, ["-m", "stages"], tensor_parallel_size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_it_is_the_run_of_one(tmp_path, in_process(True, None))
    assert not list(Path("/dev/shm").glob("*cpushm*"))
