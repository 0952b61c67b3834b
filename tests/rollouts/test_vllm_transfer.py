"""Weights over a group of servers: what is said in which order, how tensors are packed, and servers that refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import StageError
from stages.rollouts import vllm_weight_parts
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_problems import server_problems
from stages.rollouts.engine_settings import EngineConfig, OverlappedEngineConfig
from stages.rollouts.vllm_connection import Address, Connection
from stages.rollouts.vllm_given_servers import GivenServers
from stages.rollouts.vllm_nccl_group import address_towards, vllm_group
from stages.rollouts.vllm_transfer import NcclTransfer
from stages.rollouts.vllm_weight_parts import parts
from stages.rollouts.weight_files import WeightFiles
from tests.rollouts.fake_vllm import serving
from tests.rollouts.memory_group import MemoryGroup
from tests.waiting import LIMIT_SECONDS

WEIGHTS = [
    ("embed.weight", torch.arange(6.0).view(2, 3)),
    ("norm.weight", torch.tensor([0.5, -0.5])),
    ("steps", torch.tensor([7])),  # no number of the model's type
    ("head.weight", torch.arange(6.0).view(3, 2).t()),  # not in the order of its memory
]


class Worker:
    """A server with so many workers that take what the group sends, and keep a record of what they were asked."""

    def __init__(self, size: int, groups: list[MemoryGroup], wrong: dict[str, Any] | None = None) -> None:
        self.size, self.groups, self.wrong = size, groups, wrong or {}
        self.asked: list[str] = []
        self.offset, self.told = 0, threading.Event()
        self.has: dict[str, torch.Tensor] = {}
        self.version = "none"

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        name = path.removeprefix("/v1").removeprefix("/")
        self.asked.append(name)
        if name in self.wrong:
            return self.wrong[name]
        if name == "get_world_size":
            return {"world_size": self.size}
        if name == "init_weight_transfer_engine":
            self.offset = body["init_info"]["rank_offset"]
        if name == "update_weights":
            self._take(**body["update_info"])
        if name == "update_weight_version":
            self.version = body["new_version"]
        if name == "finish_weight_update":
            self.version = body.get("weight_version", self.version)
        if name in ("weight_info", "models", "server_info?config_format=json"):
            return self._about(name)
        return {"success": True} if name == "reset_prefix_cache" else {"message": "done"}

    def _about(self, name: str) -> Any:
        settings = {"model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.bfloat16"}}
        return {"weight_version": self.version, "data": [{"id": "m"}], "vllm_config": settings}

    def _take(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        for rank in range(self.offset, self.offset + self.size):
            received = self.groups[-1].waiting[rank].get(timeout=LIMIT_SECONDS)
            start = 0
            for name, dtype_name, shape in zip(names, dtype_names, shapes, strict=True):
                dtype = getattr(torch, dtype_name)
                size = dtype.itemsize * torch.Size(shape).numel()
                self.has[name] = received[start : start + size].view(dtype).view(shape)
                start += size
            assert start == len(received)


@pytest.fixture
def groups() -> list[MemoryGroup]:
    return []


@pytest.fixture
def transfer(groups: list[MemoryGroup]) -> Iterator[NcclTransfer]:
    def opened(address: str, port: int, size: int) -> MemoryGroup:
        assert address == "127.0.0.1" and port > 0
        groups.append(MemoryGroup(size))
        return groups[-1]

    transfer = NcclTransfer(torch.bfloat16, 10.0, opened)
    yield transfer
    transfer.close()


def connected(stack: ExitStack, *workers: Worker) -> list[Connection]:
    urls = [stack.enter_context(serving(worker)) for worker in workers]
    return [Connection(Address("m", url, label=f"server {number}"), 10.0) for number, url in enumerate(urls, start=1)]


@contextmanager
def given(
    workers: list[Worker], transfer: NcclTransfer, folder: Path, settings: Callable[..., EngineConfig]
) -> Iterator[GivenServers]:
    """Servers of somebody else, which would take weights from no file."""
    model = ServedModel(Path("m"), Path("m"), "bfloat16", vocabulary=10, end_token_ids=(2,), seed=1)
    with ExitStack() as stack:
        urls = tuple(stack.enter_context(serving(worker)) for worker in workers)
        config = settings(engine="vllm_server", weight_transfer="nccl", urls=urls)
        yield GivenServers(config, model, WeightFiles(folder / "none"), "run", print, transfer)


SENT = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
STILL = ["pause?mode=keep&clear_cache=false", "update_weight_version"]
MET = ["get_world_size", "init_weight_transfer_engine"]


def test_every_worker_of_every_server_has_the_weights(transfer: NcclTransfer, groups: list[MemoryGroup]) -> None:
    with ExitStack() as stack:
        workers = [Worker(2, groups), Worker(1, groups)]
        both = connected(stack, *workers)
        transfer.send(iter(WEIGHTS), both)
        assert [group.size for group in groups] == [4] and [worker.offset for worker in workers] == [1, 3]
        transfer.send(((name, tensor + 1) for name, tensor in WEIGHTS), both)
        for worker in workers:
            assert sorted(worker.asked[:3]) == sorted([*MET, "shutdown_weight_transfer_engine"])
            assert worker.asked[3:] == SENT * 2
            for name, tensor in WEIGHTS:
                expected = (tensor + 1).to(torch.bfloat16) if tensor.is_floating_point() else tensor + 1
                assert torch.equal(worker.has[name], expected)
        transfer.send(iter(WEIGHTS), both[1:])  # the first one is gone: another group
        assert groups[0].closed and [group.size for group in groups] == [4, 2] and workers[1].offset == 1


def test_servers_of_somebody_else_have_the_version_that_is_sent(
    transfer: NcclTransfer, groups: list[MemoryGroup], tmp_path: Path
) -> None:
    """One that has forgotten it, started again by whoever runs it, gets no prompts until the next weights."""
    workers = [Worker(1, groups), Worker(1, groups)]
    with given(workers, transfer, tmp_path, EngineConfig) as servers:
        assert set(servers.absent()) == {0, 1}
        servers.load(iter(WEIGHTS))
        assert not servers.absent() and {worker.version for worker in workers} == {"run-000000001"}
        workers[1].version = "none"
        assert set(servers.absent()) == {1}
        servers.load(iter(WEIGHTS))
        assert not servers.absent() and not (tmp_path / "none").exists()


def test_amid_completions_they_come_between_two_tokens(
    transfer: NcclTransfer, groups: list[MemoryGroup], tmp_path: Path
) -> None:
    """Of servers that stand still, and forget nothing; of weights that came in part nothing is believed."""
    workers = [Worker(1, groups), Worker(1, groups)]
    in_flight = partial(OverlappedEngineConfig, max_staleness=1, in_flight_updates=True)
    with given(workers, transfer, tmp_path, in_flight) as servers:
        for number in (1, 2):
            for worker in workers:
                worker.asked.clear()
            servers.load(iter(WEIGHTS))
            assert servers.weights_name == f"run-00000000{number}"
            assert {worker.version for worker in workers} == {servers.weights_name}
        assert [worker.asked[1:] for worker in workers] == [[*STILL, *SENT[:-1], "resume"]] * 2
        workers[1].wrong = {"update_weights": 500}
        with pytest.raises(StageError, match="would not take new weights: status 500"):
            servers.load(iter(WEIGHTS))
        assert {worker.version for worker in workers} == {"neither"}
        assert [worker.asked[-1] for worker in workers] == ["resume"] * 2


def test_parts_are_cut_behind_the_tensor_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16: 12, 4 and 12 bytes, and 8 of the integer; a part of more than 16 ends."""
    monkeypatch.setattr(vllm_weight_parts, "PART_BYTES", 16)
    found = [[name for name, _ in part] for part in parts(WEIGHTS, torch.bfloat16)]
    assert found == [["embed.weight", "norm.weight", "steps"], ["head.weight"]]
    monkeypatch.setattr(vllm_weight_parts, "PART_BYTES", 11)
    found = [[name for name, _ in part] for part in parts(WEIGHTS, torch.bfloat16)]
    assert found == [["embed.weight"], ["norm.weight", "steps"], ["head.weight"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"update_weights": 500}, "server 2 would not take new weights: status 500"),
        ({"init_weight_transfer_engine": 500}, "server 2 would not join the trainer for new weights: status 500"),
        ({"get_world_size": {"world_size": None}}, "server 2 gave None for the number of its workers"),
        ({"finish_weight_update": None}, "server 2 broke off where it was to finish with new weights"),
        ({"reset_prefix_cache": {"success": False}}, "server 2 could not forget its prefix cache"),
    ],
)
def test_a_server_that_refuses_is_an_error_and_no_waiting(
    wrong: dict[str, Any], message: str, transfer: NcclTransfer, groups: list[MemoryGroup]
) -> None:
    """Where one does not come to the broadcast, it never ends."""
    with ExitStack() as stack:
        with pytest.raises(StageError, match=message):
            transfer.send(iter(WEIGHTS), connected(stack, Worker(1, groups), Worker(1, groups, wrong)))
        if "update_weights" in wrong:
            assert groups[0].closed and not all(one.empty() for one in groups[0].waiting.values())


def test_weights_that_never_arrive(groups: list[MemoryGroup]) -> None:
    class Stuck(MemoryGroup):
        def broadcast(self, packed: torch.Tensor) -> Any:
            super().broadcast(packed)
            return lambda: False

    def opened(address: str, port: int, size: int) -> Stuck:
        groups.append(Stuck(size))
        return groups[-1]  # type: ignore[return-value]

    with ExitStack() as stack, pytest.raises(StageError, match=r"within 0.5 s \(rollouts.request_timeout_seconds\)"):
        NcclTransfer(torch.float32, 0.5, opened).send(iter(WEIGHTS), connected(stack, Worker(1, groups)))
    assert groups[0].closed


def test_the_trainer_is_reached_where_the_servers_are(tmp_path: Any) -> None:
    here = [Address("m", socket=tmp_path / "socket"), Address("m", "http://127.0.0.1:8000")]
    assert address_towards(here) == "127.0.0.1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without GPU")
def test_without_gpus_it_is_refused() -> None:
    with pytest.raises(StageError, match=r"weight_transfer nccl is between GPUs, .* none here; use folder"):
        vllm_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "1", "max_restarts": 3}, "has no weights of the moment"),
        ({"max_restarts": 0}, "needs rollouts.devices"),
        ({"urls": ("http://gpu:8000",), "weights_folder": "/shared"}, "weights_folder is of weight_transfer folder"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    config = EngineConfig(engine="vllm_server", weight_transfer="nccl", **settings)
    assert any(message in problem for problem in server_problems(config))


@pytest.mark.parametrize("settings", [{"devices": "1", "max_restarts": 0}, {"urls": ("http://gpu:8000",)}])
def test_settings_that_do(settings: dict[str, Any]) -> None:
    assert not server_problems(EngineConfig(engine="vllm_server", weight_transfer="nccl", **settings))
