"""Servers that somebody else runs, started as docs/rollouts.md says, and what is asked of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from tests.waiting import LEFT_SECONDS

START_SECONDS = 540
"""For what takes a minute on a machine that does nothing else."""
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
    with ExitStack() as kept:
        ports = [kept.enter_context(_kept_port()) for _ in models]
        servers = {
            name: _start(model, logs / f"{name}.log", port)
            for (name, model), port in zip(models.items(), ports, strict=True)
        }
        try:
            yield servers
        finally:
            for server in servers.values():
                assert server.process.stdin is not None
                server.process.stdin.close()
            for server in servers.values():
                server.process.wait(LEFT_SECONDS)


def _start(model: Path, log: Path, port: int) -> Running:
    url = f"http://127.0.0.1:{port}"
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
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert server.process.poll() is None and time.monotonic() < deadline, server.log.read_text()[-4000:]
        try:
            if httpx.get(f"{server.url}/health").status_code == httpx.codes.OK:
                return server.url
        except httpx.TransportError:
            pass
        time.sleep(0.2)


@contextmanager
def _kept_port() -> Iterator[int]:
    """Nobody else is given it until the block ends; who asks for it as vLLM does, by its number and SO_REUSEADDR,
    listens there. A free port would be another one's by the time that vLLM has been imported."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def asked(url: str, model: ServedModel, folder: Path, **settings: Any) -> ServerEngine:
    """An engine behind the server, as a stage opens it; weights go through the folder."""
    config = OverlappedEngineConfig(engine="vllm_server", urls=(url,), weights_folder=str(folder), **settings)
    files = WeightFiles(folder / "weights", model.adapter)
    return ServerEngine(GivenServers(config, model, files, folder.name, print), model, config)
