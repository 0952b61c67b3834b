"""The process of a server: it starts, it fails with its own words, and nothing of it stays, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import PYTHON_VARIABLE, EngineConfig
from stages.rollouts.vllm_connection import Address, Connection
from stages.rollouts.vllm_server import MODULE, VllmServer
from tests.waiting import LEFT_SECONDS, LIMIT_SECONDS, until

ROOT = Path(__file__).parents[2]
FAKE = "tests.rollouts.fake_vllm"


@pytest.fixture(autouse=True)
def _imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(tmp_path: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch, **settings: float) -> VllmServer:
    monkeypatch.setenv("FAKE_VLLM", behaviour)
    return begun(tmp_path, FAKE, **settings)


def begun(tmp_path: Path, module: str, **settings: float) -> VllmServer:
    return VllmServer(
        model(tmp_path),
        EngineConfig(engine="vllm_server", **settings),
        tmp_path / "vllm.log",
        folder=tmp_path / "of the server",
        name="ours",
        devices=None,
        module=module,
    )


def model(tmp_path: Path) -> ServedModel:
    return ServedModel(tmp_path, tmp_path, "float32", vocabulary=10, end_token_ids=(2,), seed=1)


def family(process: psutil.Process) -> list[psutil.Process]:
    """It, the server and the server's child, once they are there."""
    return [process, *until(lambda: found if len(found := process.children(recursive=True)) > 1 else None)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=LEFT_SECONDS)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_starts_is_asked_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, "works", monkeypatch)
    server.await_answer()
    processes, folder = family(psutil.Process(server._process.pid)), server.folder
    assert folder.stat().st_mode & 0o077 == 0  # nobody else may send it weights
    assert server.state().startswith("it is running still")
    assert not server.socket.exists()  # it has no weights yet
    server.publish()
    Connection(Address("ours", socket=server.socket), LIMIT_SECONDS).check_name()
    with pytest.raises(StageError, match="serves ours, not theirs"):
        Connection(Address("theirs", socket=server.socket), LIMIT_SECONDS).check_name()
    assert server.is_well()
    server.stop()
    assert all_gone(processes) and not folder.exists()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (
            "dies",
            r"(?s)did not start: it ended with status 3\n  ValueError: this model has 16 heads of nothing.*vllm.log",
        ),
        ("is killed", r"did not start: it was killed, as happens when memory runs out \(give it less: kv_cache_gib"),
        ("never answers", r"(?s)did not answer within 1 s; raise rollouts.start_timeout_seconds, .*loading, loading"),
    ],
)
def test_never_healthy(behaviour: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    (tmp_path / "vllm.log").write_text("ValueError: of a life before\n")
    seconds = 1.0 if behaviour == "never answers" else LIMIT_SECONDS
    server = start(tmp_path, behaviour, monkeypatch, start_timeout_seconds=seconds)
    if behaviour == "never answers":  # the second may be over before it is there at all
        until(lambda: "loading, loading" in (tmp_path / "vllm.log").read_text())
    with pytest.raises(StageError, match=message) as told:
        server.await_answer()
    server.stop()
    assert "of a life before" not in str(told.value)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_an_interpreter_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setenv(PYTHON_VARIABLE, str(bare / "bin/python"))
    server = begun(tmp_path, MODULE)
    with pytest.raises(StageError, match=r"bare/bin/python has no vLLM; pip install .*launch.vllm_python"):
        server.await_answer()
    server.stop()


def test_a_server_that_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, "works", monkeypatch)
    server.await_answer()
    guard, one, *rest = family(psutil.Process(server._process.pid))
    one.kill()
    assert server.state().startswith("it was killed, as happens when memory runs out")
    assert all_gone([guard, one, *rest])  # the guard ends what the server has left
    server.stop()


def test_nothing_stays_of_a_server_whose_trainer_is_asked_to_end(tmp_path: Path) -> None:
    program = (
        "import pathlib, time; from tests.rollouts.test_vllm_server import *\n"
        f"server = begun(pathlib.Path({str(tmp_path)!r}), FAKE); server.await_answer()\n"
        "print(server.folder, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "FAKE_VLLM": "works"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    folder = Path(trainer.stdout.readline().strip())
    (guard,) = psutil.Process(trainer.pid).children()
    processes = family(guard)
    os.kill(trainer.pid, signal.SIGTERM)
    trainer.wait()
    assert all_gone(processes) and not folder.exists()
