"""Several servers of a stage, real processes that are really killed: no completion is lost, twice there or another
one, and nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil
import pytest
import torch

from artifacts.errors import StageError
from stages.rollouts import vllm_own_servers
from stages.rollouts.engine import ServedAdapter, ServedModel
from stages.rollouts.engine_settings import EngineConfig, OverlappedEngineConfig
from stages.rollouts.kept_folder import KeptFolder, remove_forgotten
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_own_servers import OwnServers
from stages.rollouts.vllm_seen_servers import SeenServers
from stages.rollouts.weight_files import WeightFiles
from tests.rollouts.fake_vllm import continuation, digest
from tests.waiting import LEFT_SECONDS, until

ROOT = Path(__file__).parents[2]
FAKE = "tests.rollouts.fake_vllm"
SETTINGS = SamplingConfig(max_completion_length=6)
# those that begin with 7 kill the server that is to complete them, where the test says so
REQUESTS = [SampleRequest([first, number], (10 * number, 0, 0), f"r{number}") for number, first in enumerate([4, 7, 5])]
REQUESTS += [SampleRequest([4, 9, number], (number, 0), f"s{number}", limits=(2, 6)) for number in range(6)]

Start = Callable[..., tuple[OwnServers, ServerEngine, list[str]]]


def model(folder: Path) -> ServedModel:
    return ServedModel(folder, folder, "float32", vocabulary=10, end_token_ids=(2,), seed=1)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(behaviour, **settings) -> (servers, engine, what was said of them)"""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    others = descendants()
    opened: list[OwnServers] = []

    def build(
        behaviour: str, adapter: ServedAdapter | None = None, **settings: float
    ) -> tuple[OwnServers, ServerEngine, list[str]]:
        monkeypatch.setenv("FAKE_VLLM", behaviour)
        config, said = OverlappedEngineConfig(engine="vllm_server", **settings), []
        served = replace(model(tmp_path), adapter=adapter)
        servers = OwnServers(served, config, tmp_path, said.append, FAKE)
        opened.append(servers)
        return servers, ServerEngine(servers, served, config), said

    yield build
    for servers in opened:
        servers.stop()
        assert not servers.folder.exists()
    assert descendants() <= others


def descendants() -> set[psutil.Process]:
    """Of these tests: other tests' servers may be among them."""
    return {one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE}


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    return [("w", torch.full((3,), value))]


def expected(value: float, tmp_path: Path) -> list[list[list[int]]]:
    """What a model of these weights answers, without any server."""
    files = WeightFiles(tmp_path / f"expected-{value}")
    files.write(weights(value))
    of = digest(files.folder)
    return [
        [
            continuation(of, request.prompt_ids, request.seeds[0] + place, limit)
            for place, limit in enumerate(request.limits or [6] * len(request.seeds))
        ]
        for request in REQUESTS
    ]


def sampled(engine: ServerEngine) -> list[list[list[int]]]:
    seen: list[tuple[int, int]] = []
    found = engine.sample(REQUESTS, SETTINGS, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (21, 21) and seen == sorted(seen)
    return [[one.token_ids for one in group] for group in found]


def tokens(found: list[list[list[int]]]) -> int:
    return sum(len(one) for group in found for one in group)


def await_absent(servers: OwnServers) -> dict[int, str]:
    """Those that are gone for good, once whoever watches them has seen it."""
    return until(servers.absent)


@pytest.mark.parametrize("adapter", [None, ServedAdapter(4, {"r": 4, "target_modules": ["q_proj"]})])
def test_the_one_that_is_killed_amid_a_generation_comes_back_with_the_weights_of_the_moment(
    adapter: ServedAdapter | None, start: Start, tmp_path: Path
) -> None:
    """Those of the adapter, where there is one."""
    _, engine, said = start("killed by 7 once", adapter)  # alone, so it has to answer itself
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path)
    assert engine.figures()["server_1/restarts"] == 1
    assert engine.figures()["server_1/tokens"] == tokens(expected(1.0, tmp_path))
    (told,) = said
    assert "it was killed, as happens when memory runs out" in told and "started again, 1 of 3 times" in told
    engine.load(weights(2.0))
    assert sampled(engine) == expected(2.0, tmp_path)


def test_another_one_does_what_it_left(start: Start, tmp_path: Path) -> None:
    servers, engine, _ = start("killed by 7 once", servers=2, max_restarts=0)
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path)
    engine.load(weights(2.0))
    assert sampled(engine) == expected(2.0, tmp_path)
    gone = await_absent(servers)
    assert len(gone) == 1
    # other processes, which have not started them, know it as well, and ask the same one
    beside = ServerEngine(
        SeenServers(servers.folder, 2), model(tmp_path), EngineConfig(engine="vllm_server", servers=2)
    )
    assert sampled(beside) == expected(2.0, tmp_path)
    figures, idle = engine.figures(), next(iter(gone)) + 1
    assert figures[f"server_{3 - idle}/tokens"] > figures[f"server_{idle}/tokens"]
    assert sum(figures[f"server_{number}/tokens"] for number in (1, 2)) == sum(
        tokens(expected(value, tmp_path)) for value in (1.0, 2.0)
    )
    assert all(figures[f"server_{number}/most_outstanding_tokens"] > 0 for number in (1, 2))


def test_one_that_was_killed_before_new_weights_came_serves_the_new_ones(start: Start, tmp_path: Path) -> None:
    servers, engine, _ = start("works")
    engine.load(weights(1.0))
    for process in psutil.Process(servers._servers[0]._process.pid).children():
        process.kill()
    engine.load(weights(2.0))
    assert sampled(engine) == expected(2.0, tmp_path)
    assert servers.restarts() == [1]


def test_one_that_lives_without_serving_is_started_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_own_servers, "_UNWELL_SECONDS", 1.0)
    _, engine, said = start("unwell at 7")
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path)
    assert "it lived for 1 s without serving" in said[0]


def test_none_is_left(start: Start) -> None:
    _, engine, _ = start("killed by 7", servers=2, max_restarts=0)
    with pytest.raises(
        StageError, match=r"(?s)no vLLM server is left.*\nvLLM server 1 of 2: it was killed.*vllm-1.log"
    ) as told:
        engine.sample(REQUESTS, SETTINGS)
    assert "vLLM server 2 of 2: it was killed, as happens when memory runs out" in str(told.value)
    assert "vllm-2.log" in str(told.value) and "(rollouts.max_restarts)" in str(told.value)


def test_one_of_two_that_does_not_start_ends_the_other(start: Start) -> None:
    others = descendants()
    with pytest.raises(StageError, match=r"(?s)^vLLM server 2 of 2 did not start: it ended with status 3.*no memory"):
        start("second dies", servers=2)
    assert descendants() <= others


def test_each_has_devices_of_its_own() -> None:
    two = EngineConfig(engine="vllm_server", servers=2, devices=("0,1", "2,3"))
    assert [two.devices_of(number) for number in range(2)] == ["0,1", "2,3"]
    assert EngineConfig(engine="vllm_server", devices="5").devices_of(0) == "5"


def test_nothing_stays_of_servers_whose_trainer_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, time; from tests.rollouts.test_vllm_own_servers import *\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "servers = OwnServers(model(folder), EngineConfig(engine='vllm_server', servers=2), folder, print, FAKE)\n"
        "servers.load(weights(1.0))\n"
        "print(servers.folder, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "FAKE_VLLM": "works", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    folder = Path(trainer.stdout.readline().strip())
    processes = psutil.Process(trainer.pid).children(recursive=True)
    assert len(processes) == 7  # two guards, servers and children of theirs, and who keeps the folder
    assert list(folder.rglob("*.safetensors"))
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    _, alive = psutil.wait_procs(processes, timeout=LEFT_SECONDS)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()


def test_what_nobody_could_remove_is_removed_later(tmp_path: Path) -> None:
    living, forgotten, other = KeptFolder(tmp_path, "w-"), KeptFolder(tmp_path, "w-"), tmp_path / "w-other"
    other.mkdir()
    forgotten._keeper.kill()
    forgotten._keeper.wait()
    os.close(forgotten._lock)  # as the kernel does when its process ends
    remove_forgotten(tmp_path, "w-")
    assert living.path.exists() and other.exists() and not forgotten.path.exists()
    living.remove()
    assert not living.path.exists()


def test_none_is_removed_while_it_is_made(tmp_path: Path) -> None:
    """Another stage looks for forgotten ones before every line that makes one."""
    looks = []

    def look(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        if frame.f_code is not KeptFolder.__init__.__code__:
            return None
        if event == "line":
            remove_forgotten(tmp_path, "w-")
            looks.append(frame.f_lineno)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        made = KeptFolder(tmp_path, "w-")
    finally:
        sys.settrace(before)
    assert len(set(looks)) >= 5
    assert made.path.exists()
    made.remove()
