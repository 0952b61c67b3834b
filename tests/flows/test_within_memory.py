"""Stages whose processes ran out of memory are started again with smaller micro-batches, as long as that can help."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from flows.failure import explain, killed_for_memory
from flows.launch import run_stage_process
from flows.stage_result import StageFailed, StageOutOfMemory, StageResult
from flows.supervise import kills_since, oom_kills
from flows.within_memory import within_memory
from tests.flows.test_launch import launch
from tests.flows.test_launch import spec as spec_for

SPEC = {"name": "dpo", "fingerprint": "f", "identity": {"config": {}}, "config": {"micro_batch_tokens": 8192, "x": 1}}


def needs(tokens: int, started: list[dict[str, Any]]) -> Any:
    """A stage that fits with micro-batches of so many tokens; the kernel kills what is larger."""

    def start(spec: dict[str, Any]) -> str:
        started.append(spec)
        if (used := spec["config"]["micro_batch_tokens"]) > tokens:
            raise StageOutOfMemory("killed by the kernel", smaller=used // 2)
        return "result"

    return start


def test_halved_until_it_fits_at_the_same_fingerprint() -> None:
    started: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    assert within_memory(SPEC, needs(2048, started), said.append) == "result"
    assert [spec["config"] for spec in started] == [{"micro_batch_tokens": n, "x": 1} for n in (8192, 4096, 2048)]
    assert all(spec["fingerprint"] == "f" and spec["identity"] == SPEC["identity"] for spec in started)
    assert [event["text"] for event in said] == [
        f"killed by the kernel; starting dpo again with micro_batch_tokens {n}, from its last checkpoint"
        for n in ("4,096", "2,048")
    ]
    assert SPEC["config"]["micro_batch_tokens"] == 8192  # type: ignore[index]


def test_the_floor_is_stated() -> None:
    started: list[dict[str, Any]] = []
    with pytest.raises(StageFailed, match="less than 128 tokens save nothing that matters; `posttrain plan") as caught:
        within_memory(SPEC, needs(1, started), lambda event: None)
    assert not isinstance(caught.value, StageOutOfMemory)
    assert started[-1]["config"]["micro_batch_tokens"] == 128


@pytest.mark.parametrize("config", [{"micro_batch_tokens": 8192}, {}])
def test_what_smaller_micro_batches_cannot_mend(config: dict[str, int]) -> None:
    def start(_: dict[str, Any]) -> StageResult:
        raise StageOutOfMemory("killed by the kernel", smaller=None if config else 100)

    with pytest.raises(StageFailed, match="had not come to its first micro-batch"):
        within_memory({**SPEC, "config": config}, start, lambda event: None)


def test_real_processes(tmp_path: Path) -> None:
    given = spec_for(tmp_path, "out of memory above 300 tokens")
    given["config"]["micro_batch_tokens"] = 1000
    events: list[dict[str, Any]] = []
    result = within_memory(given, lambda spec: run_stage_process(spec, launch(), events.append), events.append)
    assert result.metrics == {"loss": 0.5}
    assert [event["tokens"] for event in events if event["kind"] == "micro_batch"] == [1000, 500, 250]
    assert len([event for event in events if event["kind"] == "warning"]) == 2


def counters(root: Path, *, version: int, kills: int) -> None:
    """The files of a machine whose control group counted so many kills."""
    group = root / ("sys/fs/cgroup/jobs/a" if version == 2 else "sys/fs/cgroup/memory/jobs/a")
    group.mkdir(parents=True, exist_ok=True)
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("0::/jobs/a\n" if version == 2 else "5:cpu:/x\n4:memory:/jobs/a\n0::/\n")
    if version == 2:
        (group / "memory.events").write_text(f"low 0\nmax 7\noom {kills}\noom_kill {kills}\noom_group_kill 0\n")
    else:
        (group / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_kernels_counters(tmp_path: Path, version: int) -> None:
    counters(tmp_path, version=version, kills=3)
    before = oom_kills(tmp_path)
    assert list(before.values()) == [3] and kills_since(before, tmp_path) == 0
    counters(tmp_path, version=version, kills=5)
    assert kills_since(before, tmp_path) == 2
    assert kills_since({}, tmp_path) is None


@pytest.mark.parametrize(
    ("ended", "log", "evident", "words"),
    [
        ({"signal": signal.SIGKILL, "oom_kills": 1}, "", True, "killed by signal 9: out of memory, says the kernel"),
        ({"signal": signal.SIGKILL, "oom_kills": 0}, "", False, "the kernel counted no process killed for memory"),
        ({"signal": signal.SIGKILL, "oom_kills": None}, "", False, "killed by signal 9: out of memory?"),
        ({"signal": None, "oom_kills": 2}, "exitcode  : -9 (pid: 4)\n", True, "out of memory, says the kernel"),
        ({"signal": None, "oom_kills": 2}, "ValueError: x\n", False, "ValueError"),
        ({"signal": signal.SIGKILL, "oom_kills": 1, "reason": "stopped"}, "", False, "stopped"),
    ],
)
def test_only_the_kernels_word_counts(
    tmp_path: Path, ended: dict[str, Any], log: str, evident: bool, words: str
) -> None:
    (tmp_path / "exit.json").write_text(json.dumps({"returncode": 1, "reason": None, "max_rss_bytes": 2**30, **ended}))
    (tmp_path / "log.txt").write_text(log)
    assert killed_for_memory(tmp_path) is evident
    assert words in explain(tmp_path, 1)[0]
