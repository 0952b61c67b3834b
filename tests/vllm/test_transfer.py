"""The contract of weights over NCCL, without a GPU: our client against vLLM's own routes, worker and engine for it;
only the communicator is one in memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from artifacts.errors import StageError
from stages.rollouts import vllm_weight_parts
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.vllm_connection import Address, Connection
from stages.rollouts.vllm_engine import VllmEngine
from stages.rollouts.vllm_nccl_group import vllm_group
from stages.rollouts.vllm_transfer import NcclTransfer
from stages.rollouts.vllm_weight_parts import init_info, packed, parts, update_info
from stages.training.whole_weights import whole_weights
from tests.rollouts.memory_group import MemoryGroup, Worker
from tests.vllm.models import save_model, served, teacher_forced, worst
from tests.vllm.test_engine import PLAIN, PROMPTS, REQUESTS

GROUPS: list[tuple[MemoryGroup, dict[int, dict[str, Any]]]] = []
"""(a group, what each of its workers was opened with, by rank)"""


@pytest.fixture(scope="module")
def without_gpu() -> Iterator[None]:
    """What vLLM's NCCL engine asks of CUDA, and of NCCL, where it receives."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    class Stream:
        def synchronize(self) -> None:
            pass

    def join(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> Any:
        group, joined = GROUPS[-1]
        joined[rank] = {"master_address": master_address, "master_port": master_port, "world_size": world_size}
        return group.worker(rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_common, "stateless_init_process_group", join)
        patch.setattr(packed_tensor, "_get_streams", lambda device, count: [Stream()] * count)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        yield


class Client:
    """vLLM's `AsyncLLM` in what its routes ask of it: what it does there is done here to an engine in the process."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.vllm_config = llm, llm.llm_engine.vllm_config
        self.version = "default"

    def _rpc(self, method: str, **given: Any) -> None:
        self.llm.collective_rpc(method, kwargs=given)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await asyncio.to_thread(self._rpc, "init_weight_transfer_engine", init_info=request.init_info)

    async def shutdown_weight_transfer_engine(self) -> None:
        self._rpc("shutdown_weight_transfer_engine")

    async def start_weight_update(self) -> None:
        self._rpc("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        await asyncio.to_thread(self._rpc, "update_weights", update_info=request.update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._rpc("finish_weight_update")
        self.version = weight_version or self.version

    async def get_weight_version(self) -> str:
        return self.version

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        return bool(self.llm.reset_prefix_cache())


@contextlib.contextmanager
def routes(client: Client) -> Iterator[str]:
    """The URL of a server with vLLM's own routes."""
    import uvicorn
    from fastapi import FastAPI
    from vllm.entrypoints.rl.online.api_router import router
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache_router

    app = FastAPI()
    app.state.engine_client = client
    app.include_router(router)
    app.include_router(cache_router)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def opened_groups(address: str, port: int, size: int) -> MemoryGroup:
    assert size == len(GROUPS[-1][0].waiting) + 1
    return GROUPS[-1][0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_of_vllm_has_the_weights_that_are_sent(
    tied: bool, tmp_path: Path, without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through vLLM's HTTP routes, `Worker`, `NCCLWeightTransferEngine` and the model's own loading, several parts of
    them; a second time after others."""
    monkeypatch.setattr(vllm_weight_parts, "PART_BYTES", 20_000)
    for seed in (1, 2):
        save_model(tmp_path / str(seed), seed, tied=tied)
    import vllm
    from vllm.config.weight_transfer import WeightTransferConfig

    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, weight_transfer_config=WeightTransferConfig(backend="nccl")))
    engine = VllmEngine(served(tmp_path / "1"), EngineConfig(engine="vllm", kv_cache_gib=0.05))
    client = Client(engine._llm)
    with routes(client) as url:
        connection = Connection(Address("m", url), 20.0)
        transfer = NcclTransfer(torch.float32, 20.0, opened_groups)
        group, joined = MemoryGroup(2), {}
        GROUPS.append((group, joined))
        for seed in (2, 1):
            model = LlamaForCausalLM.from_pretrained(tmp_path / str(seed), dtype=torch.float32).eval()
            transfer.send(whole_weights(model), [connection], f"version {seed}")
            assert client.version == f"version {seed}"
            sampled = engine.sample(REQUESTS, PLAIN)
            pairs = [(prompt, one) for prompt, many in zip(PROMPTS, sampled, strict=True) for one in many]
            expected = [teacher_forced(model, prompt, one.token_ids) for prompt, one in pairs]
            assert worst([one.logprobs for _, one in pairs], expected) < 1e-4
        assert len(group.sent) > 6 and list(joined) == [1]
        assert joined[1]["world_size"] == 2 and joined[1]["master_address"] == "127.0.0.1"
    engine.close()


def test_what_we_say_is_what_vllms_own_trainer_says(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer side, with its default sizes, sends the same bytes and tells the server the same of them."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    weights = [("a.weight", torch.randn(3, 4)), ("a.bias", torch.randn(3)), ("b.weight", torch.randn(4, 2).t())]

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

        def __iter__(self) -> Any:
            return iter(weights)

    told: list[tuple[str, Any]] = []

    class Control:
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            told.append(("init", init_info))

        def start_weight_update(self) -> None:
            told.append(("start", None))

        def update_weights(self, update_info: Any) -> None:
            told.append(("update", update_info))

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            told.append(("finish", weight_version))

    sent: list[torch.Tensor] = []

    class Sender:
        disabled = False

        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            sent.append(tensor.clone())

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Sender())
    assert packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES == vllm_weight_parts.PART_BYTES
    theirs = nccl_engine.NCCLTrainerInitInfo("127.0.0.1", 1234, 3, rank=0)
    nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(theirs, client=Control(), source=Source()).send_weights()
    (ours,) = parts(weights, torch.float32)
    assert told == [
        ("init", init_info("127.0.0.1", 1234, 3, rank_offset=1)),
        ("start", None),
        ("update", update_info(ours)),
        ("finish", None),
    ]
    assert len(sent) == 1 and torch.equal(sent[0], packed(ours))


def test_the_trainer_joins_by_vllms_helper(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0, on its own GPU; a communicator without a library, which sends nothing, is an error."""
    GROUPS.append((MemoryGroup(2), {}))
    GROUPS[-1][0].waiting[0] = GROUPS[-1][0].waiting[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Worker, "disabled", False, raising=False)
    vllm_group()("127.0.0.1", 4321, 2)
    assert GROUPS[-1][1] == {0: {"master_address": "127.0.0.1", "master_port": 4321, "world_size": 2}}
    monkeypatch.setattr(Worker, "disabled", True)
    with pytest.raises(StageError, match="vLLM finds no NCCL library here"):
        vllm_group()("127.0.0.1", 4321, 2)
