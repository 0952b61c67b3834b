"""Real stage processes under a real supervisor: what comes back, and that nothing is left of them."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from artifacts.errors import StageError
from flows import supervise
from flows.command import default_threads, launcher_settings, stage_command
from flows.failure import explain
from flows.launch import run_stage_process
from flows.stage_result import StageFailed, StageStopped
from flows.supervisors import STOP_SECONDS, Supervisors
from flows.tail import follow_lines, is_warning
from tests.waiting import LEFT_SECONDS, until

HERE = Path(__file__).parent
FAKE = str(HERE / "fake_stages")
ROOT = str(HERE.parent.parent)


def launch(**settings: Any) -> SimpleNamespace:
    given = {"processes": 1, "config": None, "python": None, "vllm_python": None, "env": {"PYTHONPATH": FAKE}}
    return SimpleNamespace(**{**given, **settings})


def spec(tmp_path: Path, do: str, **settings: Any) -> dict[str, Any]:
    config = {"do": do, "pids": str(tmp_path / "pids")}
    return {"name": "s", "job": str(tmp_path / "run" / "s"), "config": config, "threads": 1, **settings}


def recorded(tmp_path: Path, count: int) -> list[int]:
    """The process ids that the fake stage wrote, once it has written so many."""
    path = tmp_path / "pids"
    return until(
        lambda: (
            (ids := [int(i) for i in path.read_text().split()] if path.exists() else []) and len(ids) >= count and ids
        )
    )


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_gone(pids: list[int]) -> None:
    until(lambda: not [pid for pid in pids if alive(pid)], LEFT_SECONDS)


def exit_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "s" / "exit.json").read_text())


def test_result_events_and_warnings(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    warnings: list[str] = []
    result = run_stage_process(spec(tmp_path, "ok"), launch(), events.append, on_warning=warnings.append)
    assert result.metrics == {"loss": 0.5} and result.counts == {"rows": 3}
    assert result.outputs["model"]["id"] == "sha256:" + "0" * 64
    assert [event["kind"] for event in events] == ["command", "phase", "progress"]
    assert warnings == ["WARNING something odd"]
    ended = exit_of(tmp_path)
    assert (ended["returncode"], ended["signal"], ended["reason"], ended["killed"]) == (0, None, None, 0)
    # an interpreter is resident with more than 4 MiB and, doing nothing, with less than 1 GiB
    assert 2**22 < ended["max_rss_bytes"] < 2**30
    assert result.command == json.loads((tmp_path / "run" / "s" / "spec.json").read_text())["command"]


def test_environment_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    events: list[dict[str, Any]] = []
    run_stage_process(
        spec(tmp_path, "environment", threads=3),
        launch(env={"PYTHONPATH": FAKE, "EXTRA": "yes"}),
        events.append,
    )
    seen = json.loads((tmp_path / "run" / "s" / "seen.json").read_text())
    env = seen["env"]
    assert (env["OMP_NUM_THREADS"], env["PYTHONHASHSEED"], env["EXTRA"]) == ("3", "0", "yes")
    assert (env["TOKENIZERS_PARALLELISM"], env["CUBLAS_WORKSPACE_CONFIG"]) == ("false", ":4096:8")
    assert env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert env["AWS_SECRET_ACCESS_KEY"] == "hush"  # the store needs it
    assert "hush" not in events[0]["text"]  # and nothing that is printed or kept holds it
    assert "hush" not in (tmp_path / "run" / "s" / "spec.json").read_text()


def test_the_printed_command_runs_by_hand(tmp_path: Path) -> None:
    """The line is a script's, and says no more than where that is; the script has every setting."""
    events: list[dict[str, Any]] = []
    run_stage_process(spec(tmp_path, "environment"), launch(), events.append)
    assert events[0]["text"] == f"sh {tmp_path / 'run' / 's' / 'command.sh'}"
    seen = tmp_path / "run" / "s" / "seen.json"
    seen.unlink()
    subprocess.run(events[0]["text"], shell=True, check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert json.loads(seen.read_text())["env"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("do", "expected", "words"),
    [
        ("expected", True, ["pairs.jsonl row 3: no 'rejected'"]),
        ("raise", False, ["ZeroDivisionError: a bug", "log.txt"]),
        ("no result", False, ["status 0", "result.json"]),
        ("sigkill", False, ["killed by signal 9: out of memory?", "log.txt"]),
    ],
)
def test_failures_in_words(tmp_path: Path, do: str, expected: bool, words: list[str]) -> None:
    with pytest.raises(StageFailed) as caught:
        run_stage_process(spec(tmp_path, do), launch(), lambda event: None)
    assert caught.value.expected is expected
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if do == "expected":
        assert str(caught.value) == words[0]
    if do == "sigkill":
        assert (exit_of(tmp_path)["returncode"], exit_of(tmp_path)["signal"]) == (None, signal.SIGKILL)


def test_an_error_of_ours_is_said_once_and_where_the_rest_is(tmp_path: Path) -> None:
    """The output's last lines are its traceback and what the launcher says of it: no warnings."""
    events: list[dict[str, Any]] = []
    warnings: list[str] = []
    with pytest.raises(StageFailed, match=r"^pairs\.jsonl row 3: no 'rejected'$"):
        run_stage_process(spec(tmp_path, "expected"), launch(), events.append, on_warning=warnings.append)
    assert warnings == ["WARNING something odd"]
    log = tmp_path / "run" / "s" / "log.txt"
    assert [event["text"] for event in events if event["kind"] == "log"] == [f"the whole output is in {log}"]
    assert "DataError: pairs.jsonl row 3" in log.read_text()


def test_a_command_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"cannot start .*nowhere.*No such file"):
        run_stage_process(spec(tmp_path, "ok"), launch(python="/nowhere/python"), lambda event: None)


def test_no_result_of_an_earlier_attempt_is_taken(tmp_path: Path) -> None:
    run_stage_process(spec(tmp_path, "ok"), launch(), lambda event: None)
    with pytest.raises(StageFailed, match="no valid result"):
        run_stage_process(spec(tmp_path, "no result"), launch(), lambda event: None)


def test_daemons_of_a_finished_stage_are_ended(tmp_path: Path) -> None:
    run_stage_process(spec(tmp_path, "leave a daemon"), launch(), lambda event: None)
    all_gone(recorded(tmp_path, 1))
    assert exit_of(tmp_path)["killed"] == 1


@pytest.mark.parametrize(("do", "processes"), [("hang", 1), ("stubborn", 2)])
def test_stopping_from_another_thread(tmp_path: Path, do: str, processes: int) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run_stage_process(spec(tmp_path, do), launch(), lambda event: None, supervisors=supervisors)
        except StageStopped as error:
            errors.append(error)

    with Supervisors() as supervisors:
        thread = threading.Thread(target=work)
        thread.start()
        pids = recorded(tmp_path, processes)
    thread.join(LEFT_SECONDS)
    assert not thread.is_alive() and len(errors) == 1
    all_gone(pids)
    assert exit_of(tmp_path)["reason"] == "the flow ended or stopped this stage"
    with pytest.raises(StageStopped, match="not started"):
        run_stage_process(spec(tmp_path, do), launch(), lambda event: None, supervisors=supervisors)


def test_what_does_not_listen_gets_less_than_ten_seconds() -> None:
    """However busy the machine, that is all the time that is given."""
    assert supervise.GRACE_SECONDS < STOP_SECONDS < 10


class Flow:
    """A flow process with its supervisor and stage, each of which a test can kill."""

    def __init__(self, tmp_path: Path, do: str, count: int, **settings: Any) -> None:
        path = tmp_path / "given.json"
        given = {"spec": spec(tmp_path, do), "launch": {"env": {"PYTHONPATH": FAKE}, **settings}}
        path.write_text(json.dumps(given))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "flow_process.py"), str(path)],
            env={**os.environ, "PYTHONPATH": ROOT},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stage = recorded(tmp_path, count)
        self.supervisor = psutil.Process(self.process.pid).children()[0].pid
        self.launcher = psutil.Process(self.supervisor).children()[0].pid
        self.all = [self.process.pid, self.supervisor, self.launcher, *self.stage]


@pytest.fixture
def flow(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    started = Flow(tmp_path, "stubborn", 2)
    yield started
    for pid in started.all:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    started.process.wait()
    started.process.stderr.close()


@pytest.mark.parametrize("victim", ["process", "supervisor", "launcher"])
def test_nothing_is_left_when_one_is_killed(flow: Flow, victim: str) -> None:
    target = flow.process.pid if victim == "process" else getattr(flow, victim)
    os.kill(target, signal.SIGKILL)
    all_gone(flow.all[1:])
    assert flow.process.wait(LEFT_SECONDS) != 0


def test_sigterm_to_the_flow_and_to_the_supervisor(flow: Flow, tmp_path: Path) -> None:
    os.kill(flow.supervisor, signal.SIGTERM)
    os.kill(flow.supervisor, signal.SIGTERM)
    all_gone(flow.all[1:])
    flow.process.wait(LEFT_SECONDS)
    assert exit_of(tmp_path)["reason"] == "the supervisor was asked to stop"
    assert exit_of(tmp_path)["signal"] == signal.SIGKILL  # it ignored SIGTERM
    assert "the supervisor was asked to stop" in flow.process.stderr.read()


@pytest.mark.slow
def test_a_killed_worker_of_several_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="killed by signal 9: out of memory"):
        run_stage_process(spec(tmp_path, "second rank sigkill"), launch(processes=2, config="cpu"), lambda event: None)


def test_commands(tmp_path: Path) -> None:
    alone = stage_command(launch(), tmp_path, threads=2)
    assert alone.arguments == [sys.executable, "-m", "stages", str(tmp_path / "spec.json")]
    several = stage_command(launch(processes=2, config="cpu"), tmp_path, threads=1)
    assert several.variables["ACCELERATE_USE_CPU"] == "true"
    assert several.arguments[1:3] == ["-m", "accelerate.commands.launch"]
    assert several.arguments[-3:] == ["-m", "stages", str(tmp_path / "spec.json")]
    written = launcher_settings(str(tmp_path / "accelerate.yaml"))
    assert (written["num_processes"], written["distributed_type"]) == (2, "MULTI_GPU")
    with pytest.raises(StageError, match=r"'dpp' is neither one of cpu, ddp.*did you mean 'ddp'"):
        stage_command(launch(config="dpp"), tmp_path, threads=1)


@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_sharded_launchers_run_on_cpus(tmp_path: Path, config: str) -> None:
    command = stage_command(launch(config=config, processes=2), tmp_path, threads=1)
    assert command.variables["ACCELERATE_USE_CPU"] == "true"
    assert (command.variables.get("DS_ACCELERATOR") == "cpu") == config.startswith("zero")


def test_a_deepspeed_file_lies_beside_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "zero.yaml").write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: zero.json}\n"
    )
    (tmp_path / "job").mkdir()
    stage_command(launch(config=str(tmp_path / "zero.yaml"), processes=2), tmp_path / "job", threads=1)
    written = launcher_settings(str(tmp_path / "job" / "accelerate.yaml"))
    assert written["deepspeed_config"]["deepspeed_config_file"] == str(tmp_path / "zero.json")


def test_threads_share_the_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_threads(1, 1) == cores
    assert default_threads(cores, 1) == 1
    assert default_threads(cores, 7) == 1  # never none


def test_rank_signals_are_found_in_torchruns_report(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text(json.dumps({"returncode": 1, "signal": None, "max_rss_bytes": 2**30}))
    (tmp_path / "log.txt").write_text(
        "exitcode  : -15 (pid: 1)\nexitcode  : -11 (pid: 2)\ntraceback : Signal 11 (SIGSEGV)\n"
    )
    message, expected = explain(tmp_path, 1)
    assert "killed by signal 11 (Segmentation fault)" in message and "1.0 GiB" in message and not expected


def test_lines_are_followed_across_writes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = follow_lines(path)
    assert next(lines) == []
    path.write_bytes(b"one\ntw")
    assert next(lines) == ["one"]
    with open(path, "ab") as file:
        file.write("o\r10%\r\n\nü".encode()[:-1])
    assert next(lines) == ["two", "10%"]
    with open(path, "ab") as file:
        file.write("ü".encode()[1:] + b"\n")
    assert next(lines) == ["ü"]


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("WARNING lr is high", True),
        ("ValueError: x", True),
        ("Traceback (most recent call last):", False),  # the line of the error follows
        ("INFO step 3 of 4", False),
        # what DeepSpeed says of every machine without GPU helps nobody; of other things it is listened to
        ("[2026-11-28 06:40:37,749] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU. If "
         "you have GPU or other accelerator, we were unable to detect it.", False),
        ("[2026-11-28 06:40:37,749] [WARNING] [engine.py:1:step] skipped a step: infinite gradients", True),
        ("the mean error is 3", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_warning(line: str, warning: bool) -> None:
    assert is_warning(line) is warning
