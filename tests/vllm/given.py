"""Servers that somebody else runs, started as docs/rollouts.md says, and what is asked of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from stages.rollouts import server_guard
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import OverlappedEngineConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_given_servers import GivenServers
from stages.rollouts.weight_files import WeightFiles

_START_SECONDS = 240
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = ["--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
OPTIONS += ["--enable-scale-out"]  # which rollouts.in_flight_updates needs
FOR_ADAPTERS = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *LINEAR]
# a CPU's pages of the prefix cache hold 128 tokens, and these models read 64
SMALL = ["--kv-cache-memory-bytes", str(2**25), "--block-size", "32", "--enforce-eager", "--no-enable-chunked-prefill"]
VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Running:
    """A server that may still be starting."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def started(models: dict[str, Path], logs: Path) -> Iterator[dict[str, Running]]:
    """Servers of these models, under their names, until the block ends; nothing of them stays, however it does."""
    servers = {name: _start(model, logs / f"{name}.log") for name, model in models.items()}
    try:
        yield servers
    finally:
        for server in servers.values():
            assert server.process.stdin is not None
            server.process.stdin.close()
        for server in servers.values():
            server.process.wait(30)


def _start(model: Path, log: Path) -> Running:
    url = f"http://127.0.0.1:{(port := _free_port())}"
    where = ["--host", "127.0.0.1", "--port", str(port), "--model", str(model)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *OPTIONS, *FOR_ADAPTERS, *SMALL]
    kept = log.with_suffix("")
    kept.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-P", server_guard.__file__, str(kept), *command],
        env={**os.environ, **VARIABLES},
        stdin=subprocess.PIPE,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Running(url, log, process)


def answering(server: Running) -> str:
    """Its URL, once it answers."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        assert server.process.poll() is None and time.monotonic() < deadline, server.log.read_text()[-4000:]
        try:
            if httpx.get(f"{server.url}/health").status_code == httpx.codes.OK:
                return server.url
        except httpx.TransportError:
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(url: str, model: ServedModel, folder: Path, **settings: Any) -> ServerEngine:
    """An engine behind the server, as a stage opens it; weights go through the folder."""
    config = OverlappedEngineConfig(engine="vllm_server", urls=(url,), weights_folder=str(folder), **settings)
    files = WeightFiles(folder / "weights", model.adapter)
    return ServerEngine(GivenServers(config, model, files, folder.name, print), model, config)
