"""Two processes that train together, with vLLM inside each or over both, give the run of one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages.context import Context, local_context
from tests.stages.small_models import output, read_lines, rows_of
from tests.stages.test_other_engines import done
from tests.vllm.given import START_SECONDS
from tests.vllm.models import save_model, worst
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


def training(
    folder: Path, inputs: dict[str, Path], program: Sequence[str], **engine: Any
) -> subprocess.CompletedProcess[str]:
    """Two processes that train, run by `program`."""
    settings = settings_of("rl", {"engine": "vllm", **engine}, checkpoint_steps=1)
    return launched(local_context("rl", settings, folder=folder / "run", inputs=dict(inputs)), program)


def launched(context: Context, program: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A stage in two processes."""
    job = Path(context.spec.job)
    (job / "spec.json").write_text(json.dumps(asdict(replace(context.spec, processes=2))))
    command = stage_command(Launch(processes=2), job, threads=1)
    assert command.arguments[-3:-1] == ["-m", "stages"]
    arguments = [*command.arguments[:-3], *program, command.arguments[-1]]
    return subprocess.run(
        arguments, env=stage_environment(command), cwd=job, capture_output=True, text=True, timeout=START_SECONDS
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
    ended = training(tmp_path, saved(tmp_path / "inputs", tied=True), ["-m", "stages"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_it_is_the_run_of_one(tmp_path, in_process(True, None))


def test_they_share_one_engine_and_one_of_them_is_killed(in_process: Callable[..., Any], tmp_path: Path) -> None:
    """Each has half of its weights, so in the third generation the other waits for sums that will not come: it ends as
    well, nothing of the two is left in shared memory, and the run goes on from its checkpoint."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    inputs = saved(tmp_path / "inputs", tied=True)
    killed = training(tmp_path, inputs, [str(tmp_path / "deadly.py")], tensor_parallel_size=2)
    assert killed.returncode != 0 and "Signal 9" in killed.stderr, killed.stderr[-3000:]
    assert not processes_of(tmp_path)
    ended = training(tmp_path, inputs, ["-m", "stages"], tensor_parallel_size=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_it_is_the_run_of_one(tmp_path, in_process(True, None))
    assert not list(Path("/dev/shm").glob("*cpushm*"))


def test_what_they_share_answers_each_its_own(tmp_path: Path) -> None:
    """All weights, merged adapters and adapters alone; of a model whose only key-value head each of them has."""
    save_model(tmp_path / "tied", 1, tied=True)
    save_model(tmp_path / "other", 2, tied=True)
    save_model(tmp_path / "untied", 1)
    program = ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.vllm.shared_engine", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, *program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_an_evaluation_of_one_shard_needs_both(tmp_path: Path) -> None:
    """The second process has no prompt of its own and helps with the first's; the first proves them, by a pass of both
    over what a filter left. Greedy completions are those of the model itself."""
    inputs = saved(tmp_path / "inputs", tied=True)
    settings = {
        "rewards": ["tests.stages.small_models:letters"],
        "threshold": 3,
        "max_completion_length": 8,
        "top_k": 5,
    }
    engine = {"engine": "vllm", "kv_cache_gib": 0.05, "tensor_parallel_size": 2}
    there = local_context("evaluate", {**settings, "rollouts": engine}, folder=tmp_path / "there", inputs=dict(inputs))
    ended = launched(there, ["-m", "stages"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    (made,) = (tmp_path / "there/store/artifacts/evaluation").glob("*/files")
    expected = output(done("evaluate", tmp_path / "here", inputs, **settings), "evaluation")
    for name in ("results.json", "samples.jsonl"):
        assert (made / name).read_text() == (expected / name).read_text()
