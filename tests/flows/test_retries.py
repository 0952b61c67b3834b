"""Which failures of a stage are tried again, and how often."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import StoreError, UnreachableError
from artifacts.retry import Patience, call
from flows.failure import may_pass
from flows.retries import with_retries
from flows.run import Run
from flows.stage_result import StageFailed, StageInterrupted, StageOutOfMemory, StageStopped
from tests.flows.pipeline_stages import MAKE, World

ENDED: dict[str, Any] = {"returncode": 1, "signal": None, "reason": None, "oom_kills": 0}
UNREACHABLE = {"type": "UnreachableError", "message": "cannot read s3://b/k after 9 attempts", "expected": True}
WRONG = {"type": "DataError", "message": "row 3: Address already in use is no label", "expected": True}


@pytest.mark.parametrize(
    ("error", "ended", "log", "passes"),
    [
        (UNREACHABLE, ENDED, "", True),
        (None, ENDED, "OSError: [Errno 98] Address already in use", True),
        (None, ENDED, "torch.distributed.DistNetworkError: The client socket has failed to connect", True),
        (
            {"type": "RuntimeError", "message": "Connection reset by peer", "expected": False},
            ENDED,
            "RuntimeError: Connection reset by peer",
            True,
        ),
        (WRONG, ENDED, "", False),  # the stage says that it is the data
        ({"type": "ValueError", "message": "beta must be above 0", "expected": False}, ENDED, "", False),
        (None, ENDED, "RuntimeError: CUDA out of memory: Connection reset by peer", False),
        # a rank that was killed breaks the connections of the others
        (None, {**ENDED, "signal": 9}, "RuntimeError: Connection closed by peer", False),
        (None, ENDED, "Signal 9 (SIGKILL) received by PID 7\nRuntimeError: Connection closed by peer", False),
        (None, {**ENDED, "reason": "the flow ended"}, "OSError: [Errno 98] Address already in use", False),
        (None, None, "OSError: [Errno 98] Address already in use", False),  # its supervisor was killed
    ],
)
def test_what_may_pass(
    tmp_path: Path, error: dict[str, Any] | None, ended: dict[str, Any] | None, log: str, passes: bool
) -> None:
    for name, value in (("error.json", error), ("exit.json", ended)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "log.txt").write_text(log)
    assert may_pass(tmp_path) is passes


@pytest.mark.parametrize(("error", "unreachable"), [(TimeoutError("slow"), True), (PermissionError("no"), False)])
def test_a_store_that_does_not_answer_is_told_from_one_that_refuses(error: OSError, unreachable: bool) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(StoreError) as raised:
        call("read", "s3://b/k", fail, Patience(deadline=0.0))
    assert isinstance(raised.value, UnreachableError) is unreachable


class Attempts:
    """Raises the given errors one after the other, then gives "done"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.made = 0

    def __call__(self) -> Any:
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def interrupted(count: int) -> list[Exception]:
    return [StageInterrupted(f"storage {number}") for number in range(count)]


def test_pauses_double_and_are_announced() -> None:
    attempts, said = Attempts(*interrupted(2)), list[str]()
    result: Any = with_retries(attempts, 2, 0.01, threading.Event(), lambda event: said.append(event["text"]))
    assert result == "done" and attempts.made == 3
    assert said == [
        "storage 0; this may pass: trying again in 0 s (1 of 2)",
        "storage 1; this may pass: trying again in 0 s (2 of 2)",
    ]


def test_the_last_failure_is_raised() -> None:
    attempts = Attempts(*interrupted(3))
    with pytest.raises(StageInterrupted, match="storage 2"):
        with_retries(attempts, 2, 0.0, threading.Event(), lambda event: None)
    assert attempts.made == 3


@pytest.mark.parametrize("error", [StageFailed("wrong"), StageOutOfMemory("full"), StageStopped("the run ended")])
def test_other_failures_are_final(error: Exception) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)):
        with_retries(attempts, 5, 0.0, threading.Event(), lambda event: None)
    assert attempts.made == 1


def test_a_run_that_ends_waits_for_no_retry() -> None:
    stopping = threading.Event()
    stopping.set()
    attempts = Attempts(*interrupted(1))
    with pytest.raises(StageStopped, match="storage 0; it was not tried again: the run ended"):
        with_retries(attempts, 5, 1e6, stopping, lambda event: None)
    assert attempts.made == 1


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    import types

    module = types.ModuleType("stages.make")
    module.STAGE = MAKE  # type: ignore[attr-defined]
    monkeypatch.setattr("stages.stage.STAGES", ("make",))
    monkeypatch.setitem(sys.modules, "stages.make", module)
    return World(tmp_path)


def test_a_real_stage_whose_port_was_taken_runs_again(world: World) -> None:
    run = Run(world.plan(f"one.taken={world.folder / 'once'}", "launch.retry_delay_seconds=0", only=["one"]))
    with run.supervisors:
        assert not run.execute("one").cached
    assert world.ran() == ["one", "one"]


def test_a_real_stage_whose_data_are_wrong_does_not(world: World) -> None:
    run = Run(world.plan("one.fail=row 3 has no text", "launch.retry_delay_seconds=0", only=["one"]))
    with run.supervisors, pytest.raises(StageFailed, match="row 3 has no text"):
        run.execute("one")
    assert world.ran() == ["one"]
